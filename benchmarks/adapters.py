"""What adapters cost on the host, over calling their libraries directly with the same tensors. Needs the device.

    python benchmarks/adapters.py [NAME ...] [--rounds N] [--json benchmarks/results/adapters-<machine>.json]

Both calls are measured turn by turn in one process; figures are medians in microseconds, and the ratio is that of the
two medians. What an adapter adds is the median difference of neighbouring rounds, and the spread is how far the middle half
of those differences reaches: where it is as large as the budget, the call is marked as noisy. The budget is 2 us; the exit
code is 1 if a call is over it, noisy or not. Where a library's function is not the op without further launches, the
direct call has them too, and a line for the function alone, which does not count, tells what they cost. With names,
only kernels that begin so are measured: ``sdpa fa`` leaves out flashinfer, which compiles each of its kernels on first
use, 10 to 110 seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from adapter_pairs import ALONE, Call, pairs

import hal

BUDGET = 2.0
LIBRARIES = (
    "torch", "flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl", "flashinfer-python",
)  # fmt: skip

Figures = dict[str, float]


def microseconds(call: Call, loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    passed = time.perf_counter() - begin
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return passed / loops * 1e6


def in_turns(direct: Call, adapter: Call, loops: int = 100, rounds: int = 61) -> Figures:
    """Medians of both, and the median and interquartile range of the differences of neighbouring rounds.

    Raises:
        StatisticsError: of fewer than two rounds, which have no range.
    """
    times: list[tuple[float, float]] = []
    for _ in range(3):
        microseconds(direct, loops)
        microseconds(adapter, loops)
    for _ in range(rounds):
        times.append((microseconds(direct, loops), microseconds(adapter, loops)))
    first, second = (statistics.median(x) for x in zip(*times, strict=True))
    low, added, high = statistics.quantiles((b - a for a, b in times), n=4, method="inclusive")
    return {"direct": first, "adapter": second, "added": added, "spread": high - low, "ratio": second / first}


def table(found: dict[str, Figures]) -> str:
    """One row a call, and how many are within the budget."""
    width = max(len(name) for name in found) + 2
    lines = [f"{'call':<{width}}{'direct us':>10}{'adapter us':>12}{'added us':>10}{'spread us':>11}{'ratio':>7}"]
    for name, x in found.items():
        over = "own launches" if name.endswith(ALONE) else f"over {BUDGET:g} us"
        verdicts = [over] * (x["added"] > BUDGET) + ["noisy"] * (x["spread"] >= BUDGET)
        figures = f"{x['added']:>+10.2f}{x['spread']:>11.2f}{x['ratio']:>7.2f}"
        verdict = f"  {', '.join(verdicts)}" if verdicts else ""
        lines.append(f"{name:<{width}}{x['direct']:>10.2f}{x['adapter']:>12.2f}{figures}{verdict}")
    judged = [x["added"] <= BUDGET for name, x in found.items() if not name.endswith(ALONE)]
    return "\n".join([*lines, f"{sum(judged)} of {len(judged)} within {BUDGET:g} us"])


def report(device: hal.Device, found: dict[str, Figures]) -> dict[str, Any]:
    """What is kept: where it was measured, with what, and the figures."""
    libraries = {name: str(v) for name in LIBRARIES if (v := hal.installed(name))}
    about = {"device": device.identity(), "python": platform.python_version(), "libraries": libraries}
    return {**about, "budget_us": BUDGET, "command": " ".join(sys.argv), "us": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=61, help="of both calls in turns; more where the host is noisy")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = hal.device()
    found = {}
    for name, direct, adapter in pairs(device, *options.names):
        found[name] = in_turns(direct, adapter, rounds=options.rounds)
        print(f"measured {name}", file=sys.stderr)
    if not found:
        print(f"no kernel of {device} that begins with {' or '.join(options.names) or 'anything'} can run here")
        return 1
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(report(device, found), indent=1) + "\n")
    return int(any(x["added"] > BUDGET for name, x in found.items() if not name.endswith(ALONE)))


if __name__ == "__main__":
    raise SystemExit(main())
