"""How close HAL's choice comes to the best kernel that was measured: from a JSON of ``attention.py``, no device needed.

    python benchmarks/choices.py [benchmarks/results/attention_grid_h200.json] [--without fa3]

For each case the kernels of its phase that ran are compared: the time of the best over that of the one that HAL chooses on
such a device with these libraries installed. 1 is the best choice. No candidates are sides whose keys lie one behind the
other where the case has pages, and those that did not do what the case asks for (their figures have a note).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grid import CASES, Case

import hal

RESULTS = Path(__file__).resolve().parent / "results" / "attention_grid_h200.json"
DEVICE = "nvidia:sm_90,cuda=13.0,driver=580.159.04,memory=140GiB"
TORCH = {"torch": "2.11.0", "triton": "3.6.0", "nvidia-cudnn-cu13": "9.19.0.56"}
LIBRARIES: dict[str, dict[str, str]] = {
    "fa3": {"tokenspeed-fa3": "3.0.0.post20260810"},
    "fa4": {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"},
    "flashinfer": {"flashinfer-python": "0.6.13"},
}
"""Of the machine that the kept results are of, by side."""


class Found(NamedTuple):
    """A case: the kernel that HAL chooses, the fastest that ran, and the ratio of their times (None: it did not run)."""

    case: str
    chosen: str
    best: str
    ratio: float | None


def compare(results: dict[str, Any], without: tuple[str, ...] = ()) -> Iterator[Found]:
    """A row a case of which at least two kernels ran."""
    known = {case.name: case for case in CASES}
    ran = {side for row in results["cases"] for side, figures in row["sides"].items() if "us" in figures}
    libraries = dict(TORCH)
    for side, versions in LIBRARIES.items():
        libraries |= versions if side in ran and side not in without else {}
    with hal.simulate(devices=DEVICE, libraries=libraries):
        for row in results["cases"]:
            case = known.get(row["case"])
            times = {} if case is None else _times(row, case, without)
            if case is not None and len(times) > 1:
                chosen = str(hal.select(case.request()).kernels()[case.phase])
                best = min(times, key=lambda name: times[name])
                yield Found(case.name, chosen, best, times[best] / times[chosen] if chosen in times else None)


def _times(row: dict[str, Any], case: Case, without: tuple[str, ...]) -> dict[str, float]:
    """Kernel to microseconds, of the kernels that HAL could choose for the case."""
    return {
        figures["kernel"]: figures["us"]
        for side, figures in row["sides"].items()
        if "us" in figures
        and "note" not in figures
        and side not in without
        and figures["kernel"].endswith(f".{case.phase}")
    }


def geometric_mean(found: list[Found]) -> float:
    return statistics.geometric_mean(row.ratio for row in found if row.ratio is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--without", default="", help="sides that are not installed, with commas between them")
    options = parser.parse_args()
    without = tuple(name for name in options.without.split(",") if name)
    found = list(compare(json.loads(options.results.read_text()), without))
    width = max(len(row.case) for row in found)
    print(f"{'case':<{width}}  {'chosen':<22}{'fastest':<22}of the fastest")
    for row in found:
        ratio = "not measured" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"{row.case:<{width}}  {row.chosen:<22}{row.best:<22}{ratio}")
    print(f"geometric mean of {len(found)} cases: {geometric_mean(found):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
