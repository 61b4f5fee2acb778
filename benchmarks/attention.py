"""Attention: our kernels beside others' over one grid, and the project's targets; one run, one table, one JSON.

``python benchmarks/attention.py --json out.json`` on an accelerator. ``--only decode,prefill`` runs parts (``prefill``,
``extend``, ``decode``, ``latent``, ``ops``, ``host``), ``--only E1,P12`` cases, ``--without flashinfer`` leaves sides
out. ``--device cpu --quick`` tries the script out, small and on the CPU's kernels; those are no figures.

The cases are in ``grid.py`` and ``latents.py``, whose attention is compared in ``sides.py``, how times are taken in
``timing.py``. All sides of a ratio run in this process in turns, on random data. Fractions are of this device's own
rates, measured first: a copy, and a bfloat16 product of 8192 x 8192 matrices. ``torch`` sides have their keys one behind
the other.
Errors are relative to float32, on the last queries of the first and last row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from grid import CASES, Case, Inputs
from latents import LATENTS, LatentCase, LatentInputs, latent_runs_of
from sides import SIDES, MissingError, Side, runs_of
from timing import Clock, reason_of

PARTS = ("prefill", "extend", "decode", "latent", "ops", "host")

Row = dict[str, Any]

_LONGEST = 400
"""Characters of why a side did not run: a compiler can say thousands."""


def run_case(case: Case | LatentCase, sides: Sequence[Side], clock: Clock, rates: dict[str, float]) -> Row:
    """One case by every side: ``{"case", "phase", "flop", "bytes", "sides": {name: figures or {"missing": why}}}``."""
    inputs, find = inputs_of(case, clock.device)
    row: Row = {"case": case.name, "phase": case.phase, "flop": case.flop(), "bytes": case.num_bytes(), "sides": {}}
    timed = {}
    for side in sides:
        try:
            runs = find(side, inputs)
            out = runs.calls[0]()
            error = inputs.judge(out[0] if isinstance(out, tuple) else out)
            rounds = max(1, -(-8 // len(runs.calls))) if case.phase in ("decode", "latent") and not clock.quick else 1
            timed[side.name] = clock.prepare(runs.calls * rounds)
            about = {"kernel": runs.kernel, "error": error, "timed by": timed[side.name].how}
            row["sides"][side.name] = about | ({"note": runs.note} if runs.note else {})
        except MissingError as error:
            row["sides"][side.name] = {"missing": str(error)[:_LONGEST]}
        except Exception as error:
            row["sides"][side.name] = {"missing": f"failed: {reason_of(error)}"}
    try:
        times = clock.in_turns(timed)
    except RuntimeError as error:
        row["sides"] |= {name: {"missing": f"failed while timed: {reason_of(error)}"} for name in timed}
        return row
    for name, seconds in times.items():
        flops, traffic = row["flop"] / seconds, row["bytes"] / seconds
        row["sides"][name] |= {
            "us": seconds * 1e6, "TFLOP/s": flops / 1e12, "of matmul": flops / rates["matmul"],
            "TB/s": traffic / 1e12, "of copy": traffic / rates["copy"],
        }  # fmt: skip
    return row


def inputs_of(case: Case | LatentCase, device: str) -> tuple[Any, Callable[..., Any]]:
    """A case on a device, and what finds a side's calls for it."""
    if isinstance(case, LatentCase):
        return LatentInputs.of(case, device), latent_runs_of
    return Inputs.of(case, device), runs_of


def ratio(row: Row, other: str, ours: str) -> float | None:
    """Their time over ours: above 1 we are faster. None where one of them did not run."""
    times = [row["sides"].get(name, {}).get("us") for name in (other, ours)]
    return None if None in times else times[0] / times[1]


def heading(sides: Sequence[Side]) -> str:
    columns = ("us", "TFLOP/s", "of matmul", "TB/s", "of copy", "error", *(f"{s.name} /" for s in sides[1:]))
    return f"{sides[0].name:36}" + "".join(f"{c:>13}" if c.endswith("/") else f"{c:>10}" for c in columns)


def line(row: Row, sides: Sequence[Side]) -> str:
    """Ours in figures, the others as multiples of our time."""
    ours = row["sides"][sides[0].name]
    if "us" not in ours:
        return f"{row['case']:36}{ours['missing']}"
    figures = f"{ours['us']:10.1f}{ours['TFLOP/s']:10.1f}{ours['of matmul']:10.3f}{ours['TB/s']:10.2f}"
    figures += f"{ours['of copy']:10.3f}{ours['error']:10.1e}"
    others = (ratio(row, side.name, sides[0].name) for side in sides[1:])
    return f"{row['case']:36}{figures}" + "".join(f"{'-':>13}" if r is None else f"{r:12.2f}x" for r in others)


def missing(rows: Sequence[Row]) -> list[str]:
    """Who did not run which cases, a line a reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, side in row["sides"].items():
            if "missing" in side:
                found.setdefault((name, side["missing"]), []).append(row["case"].partition(" ")[0])
    return [f"{name}: not {', '.join(cases)}: {why}" for (name, why), cases in found.items()]


class Target(NamedTuple):
    """A figure that the project wants: ``value`` finds it in a run, or gives None where its cases did not run."""

    what: str
    least: float
    aim: float
    value: Callable[[Run], float | None]


class Run(NamedTuple):
    """What was measured. ``ops``: op to its fraction of copy; ``host``: see ``host.py``."""

    rows: Sequence[Row]
    ours: str
    ops: dict[str, float]
    host: dict[str, float]

    def geomean(self, cases: str, other: str) -> float | None:
        """Over the cases whose name starts with one of the letters."""
        ratios = [r for row in self.rows if row["case"][0] in cases and (r := ratio(row, other, self.ours)) is not None]
        return statistics.geometric_mean(ratios) if ratios else None

    def of(self, case: str, figure: str) -> float | None:
        """A figure of ours."""
        rows = [row["sides"].get(self.ours, {}) for row in self.rows if row["case"].startswith(f"{case} ")]
        return rows[0].get(figure) if rows else None

    def against(self, case: str, other: str) -> float | None:
        rows = [ratio(row, other, self.ours) for row in self.rows if row["case"].startswith(f"{case} ")]
        return rows[0] if rows else None

    def windowed(self) -> float | None:
        whole, window = self.of("P13", "us"), self.of("P14", "us")
        return None if whole is None or window is None else whole / window


def _op(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.ops.get(name)


TARGETS = (
    Target("decode D1 to D17 against fa3, geometric mean", 1.05, 1.2, lambda run: run.geomean("D", "fa3")),
    Target("decode E1 (B64 L8192 32/8 D128), of copy", 1.0, 1.04, lambda run: run.of("E1", "of copy")),
    Target("decode E2 (B64 L8192 64/8 D64), of copy", 0.95, 1.0, lambda run: run.of("E2", "of copy")),
    Target("prefill against fa3, geometric mean", 0.75, 0.95, lambda run: run.geomean("P", "fa3")),
    Target("prefill of 32k: window 1024, times faster", 10.0, 20.0, Run.windowed),
    Target("extend V0 (512 new on 8k, B8) against fa3", 0.75, 0.95, lambda run: run.against("V0", "fa3")),
    Target("rms_norm 8192x8192, of copy", 0.9, 0.97, _op("rms_norm")),
    Target("silu_and_mul 8192x8192, of copy", 0.9, 0.97, _op("silu_and_mul")),
    Target("rotary_embedding 8192 tokens, of copy", 0.9, 0.97, _op("rotary_embedding")),
    Target("kv_cache_write 8192x8192, of copy", 0.9, 0.97, _op("kv_cache_write")),
    Target("host time of a planned decode call, over a launch", 1.3, 1.1, lambda run: run.host.get("ratio")),
)
"""For the last one less is better: its ``least`` is the most."""


def summary(run: Run) -> list[dict[str, Any]]:
    """The targets, and the geometric means against everyone, with what was found."""
    found = []
    for what, least, aim, value in TARGETS:
        got = value(run)
        less = aim < least
        reached = None if got is None else (got <= least if less else got >= least)
        found.append({"what": what, "found": got, "at most" if less else "at least": least, "aim": aim, "ok": reached})
    others = dict.fromkeys(name for row in run.rows for name in row["sides"] if name != run.ours)
    for phase, letters in (("prefill", "P"), ("extend", "VX"), ("decode", "D"), ("latent", "M")):
        for name in others:
            if (got := run.geomean(letters, name)) is not None and (phase, name) not in _AS_TARGET:
                found.append({"what": f"{phase} against {name}, geometric mean", "found": got})
    return found


_AS_TARGET = {("prefill", "fa3"), ("decode", "fa3")}


def summary_line(row: dict[str, Any]) -> str:
    got = "not run" if row["found"] is None else f"{row['found']:.3f}"
    bound = next((f"{n} {row[n]:g}, aim {row['aim']:g}" for n in ("at least", "at most") if n in row), "")
    verdict = {True: "ok", False: "MISSED"}.get(row.get("ok"), "")  # type: ignore[call-overload]
    return f"{row['what']:52}{got:>10}   {bound:26}{verdict}".rstrip()


def wanted(case: Case | LatentCase, only: Sequence[str]) -> bool:
    """``only`` holds parts and ids of cases; empty means all."""
    return not only or case.phase in only or case.id in only


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=_names, default=[], help=f"of {', '.join(PARTS)} and ids of cases, with commas")
    parser.add_argument("--without", type=_names, default=[], help="sides to leave out, with commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds: no figures")
    given = parser.parse_args(arguments)
    ids = [case.id for case in (*CASES, *LATENTS)]
    known = {*PARTS, *ids}
    if unknown := [name for name in given.only if name not in known]:
        parser.error(f"--only {','.join(unknown)}: choose of {', '.join(PARTS)} and {', '.join(ids)}")
    return given


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def others(given: argparse.Namespace, clock: Clock) -> tuple[Any, Any]:
    """The ops and the host's times, where they are wanted; what fails says why."""
    found: list[Any] = []
    for part in ("ops", "host"):
        result: Any = {}
        if not given.only or part in given.only:
            try:
                result = __import__(part).targets(clock)
            except Exception as error:
                result = {"missing": reason_of(error)}
            print(part, {n: round(x, 3) if isinstance(x, float) else x for n, x in result.items()}, flush=True)
        found.append(result)
    return found[0], found[1]


def save(path: Path | None, clock: Clock, rates: dict[str, float], run: Run) -> list[Any]:
    """Writes what there is: a run that is ended early keeps its cases. Returns its summary."""
    found = summary(run)
    if path:
        about = {"device": clock.name(), **rates, "summary": found, "ops": run.ops, "host": run.host}
        path.write_text(json.dumps({**about, "cases": run.rows}, indent=1) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    clock = Clock(given.device, quick=given.quick)
    rates = {"copy": clock.copy_rate(), "matmul": clock.matmul_rate()}
    print(f"{clock.name()}: copy {rates['copy'] / 1e12:.3f} TB/s, matmul {rates['matmul'] / 1e12:.1f} TFLOP/s")
    sides = [side for side in SIDES[torch.device(given.device).type] if side.name not in given.without]
    rows = []
    print(heading(sides))
    for case in (*CASES, *LATENTS):
        if wanted(case, given.only):
            rows.append(run_case(case.quick() if given.quick else case, sides, clock, rates))
            print(line(rows[-1], sides), flush=True)
            save(given.json, clock, rates, Run(rows, sides[0].name, {}, {}))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    ops, host = others(given, clock)
    print(*missing(rows), sep="\n")
    print(*map(summary_line, save(given.json, clock, rates, Run(rows, sides[0].name, ops, host))), sep="\n")
    failed = [row["case"] for row in rows if "us" not in row["sides"][sides[0].name]]
    print("OURS DID NOT RUN: " + ", ".join(failed) if failed else "all cases ran with our kernels")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
