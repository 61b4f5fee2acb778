"""What HAL costs: at import, at init, and at each call. Prints a table; ``--json FILE`` keeps it.

    python benchmarks/dispatch.py [--json benchmarks/results/dispatch-<machine>.json]

Budgets: ``import hal`` 30 ms over bare Python, the first ``get_attention`` 50 ms with torch imported, an equal one
100 us, a bound dense call 1 us over the chosen kernel's own function, a planned call 2 us over its write and its kernel.
Each figure is a median, and whatever is compared is measured turn by turn in one process (or, for start-up, in
alternating processes).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = {
    "bare python": "pass",
    "import hal": "import hal",
    "import torch": "import torch",
}
FIRST = """
import gc, time, torch
torch.set_num_threads(1)
gc.collect()  # what importing torch left to collect is not charged to whoever comes next
t = time.perf_counter()
import hal
hal.get_attention(num_q_heads=8, num_kv_heads=8, head_dim=64, dtype=torch.float32)
print((time.perf_counter() - t) * 1e3)
"""


def start_up(rounds: int) -> dict[str, float]:
    """Median milliseconds of whole processes, alternating."""
    times: dict[str, list[float]] = {name: [] for name in START}
    for _ in range(rounds):
        for name, code in START.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def first_handle(rounds: int) -> float:
    """Median milliseconds of importing hal and making the first handle, torch already imported."""
    runs = [
        subprocess.run([sys.executable, "-c", FIRST], check=True, capture_output=True, text=True) for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def microseconds(call: Callable[[], Any], loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops * 1e6


def in_turns(calls: dict[str, Callable[[], Any]], loops: int, rounds: int) -> dict[str, float]:
    """Median microseconds of each call, measured turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        microseconds(call, loops)
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(microseconds(call, loops))
    return {name: statistics.median(values) for name, values in times.items()}


def calls(rounds: int) -> dict[str, dict[str, float]]:
    """A bound dense call, a planned decode step, and asking for an equal handle."""
    import torch

    import hal

    torch.set_num_threads(1)
    request: dict[str, Any] = {
        "num_q_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
        "dtype": torch.float32,
        "device": "cpu",
    }
    handle = hal.get_attention(**request)
    q, k, v = (torch.randn(1, 1, 8, 64) for _ in range(3))
    fn = handle.implementation("prefill")
    dense = in_turns({"function": lambda: fn(q, k, v), "handle": lambda: handle(q, k, v)}, 1000, rounds)
    cache = handle.allocate_kv_cache(4)
    plan = handle.plan(q_lens=[1], kv_lens=[9], block_table=[[0]])
    q, k, v = (x[0] for x in (q, k, v))
    step = in_turns({"step": lambda: handle(q, k, v, cache=cache, plan=plan)}, 300, rounds)
    again = in_turns({"equal get_attention": lambda: hal.get_attention(**request)}, 300, rounds)
    return {"dense call": dense, "decode step": step, "handle": again, "planned call": planned_call(handle, rounds)}


def planned_call(handle: Any, rounds: int) -> dict[str, float]:
    """A planned call whose write and kernel do nothing, and these two alone. The handle is of no use afterwards."""
    import torch

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cache = handle.allocate_kv_cache(4)
    plan = handle.plan(q_lens=[1], kv_lens=[9], block_table=[[0]])
    q, k, v = (torch.randn(1, 8, 64) for _ in range(3))
    handle._write = plan._run = nothing
    slots = plan._step.slot_mapping

    def alone() -> None:
        handle._write(k, v, cache.k, cache.v, slots, k_scale=cache.k_scale, v_scale=cache.v_scale)
        plan._run(q, cache.k, cache.v, plan._step, plan._payload, k_scale=cache.k_scale, v_scale=cache.v_scale)

    return in_turns({"functions": alone, "handle": lambda: handle(q, k, v, cache=cache, plan=plan)}, 1000, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    start = start_up(options.rounds)
    found = calls(3 * options.rounds)
    dense, planned = found["dense call"], found["planned call"]
    rows = [
        ("import hal, over bare Python", start["import hal"] - start["bare python"], 30.0, "ms"),
        ("first get_attention, torch imported", first_handle(options.rounds), 50.0, "ms"),
        ("equal get_attention", found["handle"]["equal get_attention"], 100.0, "us"),
        ("bound dense call, over the kernel's function", dense["handle"] - dense["function"], 1.0, "us"),
        ("planned call, over its write and its kernel", planned["handle"] - planned["functions"], 2.0, "us"),
    ]
    for what, value, budget, unit in rows:
        print(f"{what:<46}{value:9.2f} {unit}  budget {budget:g} {unit}  {'ok' if value <= budget else 'OVER'}")
    print(f"{'the kernel itself (torch, 1 query, 1 key)':<46}{dense['function']:9.2f} us")
    print(f"{'planned decode step, cache write included':<46}{found['decode step']['step']:9.2f} us")
    print(f"{'import torch, over bare Python':<46}{start['import torch'] - start['bare python']:9.2f} ms")
    if options.json:
        names = ("what", "value", "budget", "unit")
        budgets = [dict(zip(names, row, strict=True)) for row in rows]
        keep(options.json, {"start_up_ms": start, "calls_us": found, "budgets": budgets})


def keep(path: Path, figures: dict[str, Any]) -> None:
    import torch

    import hal

    about = {"machine": hal.device("cpu").name, "python": platform.python_version(), "torch": torch.__version__}
    path.write_text(
        json.dumps({**about, "hal": hal.__version__, "command": " ".join(sys.argv), **figures}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
