"""Variants of the prefill and extend kernels on sm_90, side by side with the tiles of the table and with flash-attn 3.

``python benchmarks/hopper_variants.py --seconds 240 --json out.json``; ``--only P1,V0`` cases, ``--variants "base;plain"``.

Each variant has a process of its own, which compiles first (all at once, on all cores), waits for its turn and then goes
through the cases, each beside the base and flash-attn 3 in turns. One that hangs or dies is ended, its case says so, and
another process does the cases behind it. Results are written as they come; what is not reached in time says so.
Columns of a table: the base's time over the variant's, and flash-attn 3's over the variant's (above 1 ours is faster);
``!`` stands behind values that are wrong or differ from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))

from grid import CASES, Case, Inputs
from sides import MissingError, Side, runs_of
from timing import Call, Clock, reason_of

import hal
from hal_ops._launch import Launch
from hal_ops.attention import triton_prefill
from hal_ops.attention._triton_configs import Config, Hopper, config_of, hopper_of
from hal_ops.attention.triton_extend import extend

Row = dict[str, Any]

_V0 = next(case for case in CASES if case.id == "V0")
_MORE = (dataclasses.replace(_V0, name="V128 Llama-8B B8 512 on 8k page 128", page=128),)
_IDS = ("P1", "P2", "P3", "P4", "P5", "P10", "P12", "P13", "V0", "V7", "P7")
KNOWN = {case.id: case for case in (*CASES, *_MORE) if case.id in _IDS or case in _MORE}
WORST = 2e-2
"""Most that a result may be off, as ``grid.Inputs.judge`` counts it."""


class Variant(NamedTuple):
    """A configuration: ``changes`` are the fields that are not as in the table, or it is ``whole``.

    ``cases``: ids that it is for. ``converted``: FP8 q and k are multiplied in 16 bits.
    """

    changes: dict[str, Any]
    cases: tuple[str, ...]
    whole: Config | None = None
    converted: bool = False

    def config(self, case: Case) -> Config | Hopper | None:
        """None where the variant is not one for the case."""
        if case.id not in self.cases:
            return None
        request, cached = case.request(), bool(case.page)
        table = hopper_of("sm_90", request, cached=cached) or config_of("sm_90", request)
        return self.whole or dataclasses.replace(table, **self.changes)


_128 = ("P1", "P2", "P5", "P12", "P13", "V7", "V128")
_ROOMY = Config(128, 128, 128, 8, 3)
VARIANTS = {
    "fp8, short": Variant({"short": True}, ("P7",)),
    "fp8, short, turns": Variant({"short": True, "turns": True}, ("P7",)),
    "fp8, for every arch": Variant({}, ("P7",), _ROOMY),
    "fp8, converted": Variant({}, ("P7",), _ROOMY, converted=True),
    "short": Variant({"short": True}, (*_128, "V0", "P4", "P10")),
    "long": Variant({"short": False}, ("P3",)),
    "no turns": Variant({"turns": False}, _128),
    "no turns, 88": Variant({"turns": False, "registers": 88}, _128),
    "24": Variant({"registers": 24}, _128),
    "base": Variant({}, tuple(KNOWN)),
}
"""``base`` is the table's. Numbers: registers of the threads that copy."""


def calls_of(case: Case, inputs: Inputs, variant: Variant) -> list[Call]:
    """One a set of inputs."""
    request, config = case.request(), variant.config(case)
    assert config is not None
    if not case.page:
        no = mock.patch.object(triton_prefill, "keys_as_they_are", return_value=False)
        with no if variant.converted else contextlib.nullcontext():
            run: Any = triton_prefill.prefill(request, inputs.device, configs=(config,))
        return [lambda three=three: run(*three) for three in inputs.sets]  # type: ignore[misc]
    handle = hal.get_attentions([request], device=inputs.device, kernel="triton")[0]
    q_lens, kv_lens = zip(*case.lengths, strict=True)
    step = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=inputs.table)._step
    paged: Any = extend(request, inputs.device, configs=(config,))
    payload = paged.plan(step)
    return [lambda three=three: paged(*three, step, payload, **inputs.kwargs) for three in inputs.sets]  # type: ignore[misc]


def compile_only(case: Case, variant: Variant) -> None:
    """Leaves what the case needs in Triton's cache, and launches nothing."""

    def first(self: Any, programs: int, key: Any, arguments: tuple[Any, ...]) -> None:
        constants = tuple(self.constants(key).values())
        self._kernel.warmup(*arguments, *constants, grid=(programs,), **self._options)

    small = dataclasses.replace(case, lengths=((256, 256),))
    with mock.patch.object(Launch, "_first", first):
        calls_of(small, Inputs.of(small, "cuda"), variant)[0]()


def measure(case: Case, variant: Variant, clock: Clock) -> Row:
    inputs = Inputs.of(case, "cuda")
    sides = {"base": calls_of(case, inputs, VARIANTS["base"]), "variant": calls_of(case, inputs, variant)}
    right = sides["base"][0]()
    found = [sides["variant"][0]() for _ in range(3)]
    apart = float((found[0].float() - right.float()).norm() / right.float().norm())
    row: Row = {
        "config": str(variant.config(case)), "error": inputs.judge(found[0]), "from base": apart,
        "same bits": all(torch.equal(found[0], other) for other in found[1:]),
    }  # fmt: skip
    del found, right
    try:
        sides["fa3"] = runs_of(Side("fa3", ("fa3",)), inputs).calls
    except MissingError as error:
        row["fa3"] = str(error)
    times = clock.in_turns({name: clock.prepare(calls) for name, calls in sides.items()})
    row["right"] = row["same bits"] and row["error"] < WORST and apart < WORST
    row["us"] = {name: seconds * 1e6 for name, seconds in times.items()}
    row["TFLOP/s"] = case.flop() / times["variant"] / 1e12
    return row


def child(name: str, ids: Sequence[str]) -> None:
    """Compiles, says so, waits, and prints a row a case."""
    variant = VARIANTS[name]
    refused = {}
    for case in (KNOWN[i] for i in ids):
        try:
            compile_only(case, variant)
        except Exception as error:
            refused[case.id] = reason_of(error)
    print("ready", flush=True)
    sys.stdin.readline()
    clock = Clock("cuda")
    for case in (KNOWN[i] for i in ids):
        try:
            row = {"failed": refused[case.id]} if case.id in refused else measure(case, variant, clock)
        except Exception as error:
            row = {"failed": reason_of(error)}
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()


class Process:
    """A child, whose lines come with a time limit."""

    def __init__(self, name: str, ids: Sequence[str]) -> None:
        self.name, self.ids = name, list(ids)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, __file__, "--child", name, "--only", ",".join(ids)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines.put(text)
        self._lines.put("")

    def line(self, limit: float) -> str:
        """Empty when the process has ended.

        Raises:
            queue.Empty: nothing came in time.
        """
        while (text := self._lines.get(timeout=max(0.01, limit))) and not text.startswith(("ready", "{")):
            pass
        return text

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """Ends it; its last words."""
        self._process.kill()
        self._process.wait(20)
        self._errors.seek(0)
        return " | ".join(self._errors.read().strip().splitlines()[-2:])[-300:]


def run_all(wanted: dict[str, list[str]], until: float, limit: float, tell: Callable[[Row], None]) -> None:
    """Goes through the variants' cases, one at a time; ``tell`` gets their rows."""
    waiting = [Process(name, ids) for name, ids in wanted.items() if ids]
    while waiting:
        process = waiting.pop(0)
        left = list(process.ids)
        try:
            started = process.line(until - time.monotonic()).startswith("ready")
            if started:
                process.go()
            while left:
                now = time.monotonic()
                text = process.line(min(limit, until - now)) if started else ""
                if not text:
                    break
                tell({"variant": process.name, "case": left.pop(0), **json.loads(text)})
            why = "died"
        except (queue.Empty, BrokenPipeError):
            why = "hung" if time.monotonic() < until else "no time left"
        words = process.end()
        if left and why == "no time left":
            for case in left:
                tell({"variant": process.name, "case": case, "failed": why})
        elif left:
            tell({"variant": process.name, "case": left.pop(0), "failed": f"{why}: {words}"})
            if left:
                waiting.append(Process(process.name, left))


def tables(rows: Sequence[Row]) -> str:
    """What was found, in ratios."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    ids = [i for i in KNOWN if any(row["case"] == i for row in rows)]
    known = {(row["variant"], row["case"]): row for row in rows}

    def cell(name: str, case: str, other: str) -> str:
        row = known.get((name, case), {})
        if "us" not in row or other not in row["us"]:
            return str(row.get("failed", "-")).partition(":")[0][:8]
        return f"{row['us'][other] / row['us']['variant']:.3f}{'' if row['right'] else '!'}"

    lines = []
    for other in ("base", "fa3"):
        lines.append(f"{other + ' /':28}" + "".join(f"{case:>9}" for case in ids))
        lines += [f"{name:28}" + "".join(f"{cell(name, case, other):>9}" for case in ids) for name in names]
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _variants(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--limit", type=float, default=25, help="seconds that one case of one variant may take")
    parser.add_argument("--only", type=_names, default=list(KNOWN), help=f"of {','.join(KNOWN)}")
    parser.add_argument("--variants", type=_variants, default=list(VARIANTS), help="names, with ; between them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.only)
        return
    until = time.monotonic() + given.seconds - 5
    ids = {name: [i for i in given.only if VARIANTS[name].config(KNOWN[i]) is not None] for name in given.variants}
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")

    run_all(ids, until, given.limit, tell)
    print(tables(rows))


if __name__ == "__main__":
    main()
