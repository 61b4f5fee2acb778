"""The ops of a decoder layer beside attention: our Triton kernels, torch's operators, torch.compile, vendors' kernels.

One run, one table, one JSON. All are measured on the same inputs, with the L2 cache flushed before each call, and the
median is taken. A time is also given as a fraction of the bandwidth at which this device copies, measured in the same
way: bytes that the op must read and write once, over the time, over the bytes per second of a copy. Each
implementation is compared with the reference on fewer tokens of the same shape.

``python benchmarks/ops.py [--json FILE] [--compile] [--only TEXT]`` on an accelerator; ``--device cpu --quick`` tries the
script out. ``tune_ops.py`` beside it measures other configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from op_rows import ROWS, SMALL, OpRow, call_of
from timing import Clock, reason_of

import hal
from hal import _plugins
from hal_ops import resolve_target

JUDGED = 256
"""Tokens on which implementations are compared with the reference."""
WRONG = 0.05
"""A relative error above it is no rounding."""

Function = Callable[..., Any]


def get(row: OpRow, device: str, library: str) -> hal.BoundOp:
    return hal.get_op(row.op, device=device, kernel=library, **row.request_fields())


def libraries(row: OpRow, device: str) -> tuple[str, ...]:
    """Ours, torch's, and those for this vendor's devices."""
    platform = hal.device(device).platform
    kernels = [k for k in _plugins.registry().kernels.values() if k.op == row.op and platform in k.platforms]
    return ("triton", "torch", *sorted({k.library for k in kernels}))


def factories(row: OpRow, device: str, compiled: bool) -> dict[str, Callable[[], Function]]:
    """Whose implementations there may be, and how to get them."""
    found: dict[str, Callable[[], Function]] = {
        library: lambda library=library: get(row, device, library).fn  # type: ignore[misc]
        for library in libraries(row, device)
    }
    if row.op == "fp8_quantize" and torch.device(device).type != "cpu":
        native = resolve_target("hal_ops.fp8_quantize.triton_quantize:fp8_quantize")
        found["triton, native"] = lambda: native(get(row, device, "torch").request, device, native=True)
    if row.op == "rms_norm" and not row.inplace:
        found["functional"] = lambda: lambda x, w: functional.rms_norm(x, x.shape[-1:], w, 1e-6)
    if compiled and not row.inplace:
        found["compiled"] = lambda: torch.compile(get(row, device, "torch").fn, fullgraph=True, dynamic=False)
    return found


def implementations(row: OpRow, device: str, compiled: bool = False) -> tuple[dict[str, Function], dict[str, str]]:
    """Those that can be had, and why not the others."""
    found, missing = {}, {}
    torch._dynamo.reset()
    for name, make in factories(row, device, compiled).items():
        try:
            found[name] = make()
        except Exception as error:
            missing[name] = _refusal(error)
    return found, missing


def _refusal(error: Exception) -> str:
    selection = getattr(error, "selection", None)
    forced = [c for choice in getattr(selection, "choices", {}).values() for c in choice.candidates if c.reasons]
    reasons = [
        f"{c.kernel.name}: {r}" for c in forced for r in c.reasons if all(x.code != "not_forced" for x in c.reasons)
    ]
    return "; ".join(reasons) or reason_of(error)


def errors(row: OpRow, device: str, made: dict[str, Function]) -> dict[str, float]:
    """Relative error of each. NaN and the like give a number that is wrong for sure."""
    few = dataclasses.replace(row, shape=(min(row.shape[0], JUDGED), *row.shape[1:]), inplace=False)
    # The reference of fp8_quantize is exact and slow; torch's kernel is held against it by the tests.
    oracle = get(few, device, "torch" if row.op == "fp8_quantize" else "reference")
    call = call_of(few, oracle.request, device)
    right, found = call.results(oracle.fn), {}
    for name, fn in made.items():
        worst = 0.0
        for a, b in zip(call.results(fn), right, strict=True):
            difference = (a - b).norm() / b.norm()
            worst = max(worst, float(difference) if bool(difference.isfinite()) else 9.0)
        found[name] = worst
    return found


def measured(row: OpRow, clock: Clock, copy: float, compiled: bool = False) -> dict[str, Any]:
    """``{"row", "bytes", "us", "of copy", "errors", "missing"}``; a number an implementation."""
    made, missing = implementations(row, clock.device, compiled)
    call = call_of(row, get(row, clock.device, "torch").request, clock.device)
    wrong = errors(row, clock.device, made)
    seconds = {name: clock.cold(partial(call, fn)) for name, fn in made.items()}
    return {
        "row": row.name, "bytes": call.num_bytes, "us": {n: 1e6 * s for n, s in seconds.items()},
        "of copy": {n: call.num_bytes / s / copy for n, s in seconds.items()}, "errors": wrong, "missing": missing,
    }  # fmt: skip


def host_time(row: OpRow, clock: Clock) -> dict[str, float]:
    """Microseconds that the host needs to enqueue one small call."""
    call = call_of(row, get(row, clock.device, "torch").request, clock.device)
    made, _ = implementations(row, clock.device)
    return {name: 1e6 * clock.enqueue(partial(call, fn)) for name, fn in made.items()}


def copy_rate(clock: Clock) -> float:
    """Bytes per second of the better of two copies, read and written bytes together, timed as the ops are."""
    best = 0.0
    for elements in (1 << 20,) if clock.quick else (8192 * 8192, 1 << 29):
        source = torch.randn(elements, device=clock.device).to(torch.bfloat16)
        target = torch.empty_like(source)
        best = max(best, 2 * source.nbytes / clock.cold(partial(target.copy_, source), 200))
    return best


TARGETS = ("rms_norm", "silu_and_mul", "rotary_embedding", "kv_cache_write")


def targets(clock: Clock) -> dict[str, float]:
    """Fraction of copy of our kernel, for the ops that the project has targets for, on their first rows."""
    copy, ours = copy_rate(clock), "triton" if torch.device(clock.device).type != "cpu" else "torch"
    rows = {name: next(row for row in ROWS if row.op == name) for name in TARGETS}
    made = {name: measured(row.quick() if clock.quick else row, clock, copy) for name, row in rows.items()}
    return {name: row["of copy"][ours] for name, row in made.items()}


def worst(row: dict[str, Any]) -> float:
    """The largest error; where nothing ran, one that is wrong for sure."""
    return max(row["errors"].values(), default=9.0)


def line(row: dict[str, Any]) -> str:
    shown = "  ".join(f"{n} {us:.1f} us {row['of copy'][n]:.3f}" for n, us in row["us"].items())
    missing = "".join(f"  {n} not: {why}" for n, why in row["missing"].items())
    return f"{row['row']:75} {shown}  errors {worst(row):.1e}{missing}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the torch kernels too, a row an op")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: no figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    clock = Clock(given.device, quick=given.quick)
    copy = copy_rate(clock)
    print(f"{clock.name()}: copy {copy / 1e12:.3f} TB/s; microseconds, and the fraction of it", flush=True)
    rows, seen = [], set()
    for row in ROWS:
        if given.only in row.name:
            row = row.quick() if given.quick else row
            rows.append(measured(row, clock, copy, given.compile and row.op not in seen))
            seen.add(row.op)
            print(line(rows[-1]), flush=True)
    small = [row.quick() if given.quick else row for row in SMALL]
    host = {row.name: host_time(row, clock) for row in small if given.only in row.name}
    for name, found in host.items():
        print(f"host {name:60}", {n: round(us, 1) for n, us in found.items()}, flush=True)
    if given.json:
        given.json.write_text(
            json.dumps({"device": clock.name(), "copy": copy, "rows": rows, "host": host}, indent=1) + "\n"
        )
    wrong = [row["row"] for row in rows if worst(row) > WRONG]
    print("WRONG: " + ", ".join(wrong) if wrong else "all results are right", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
