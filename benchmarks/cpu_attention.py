"""Attention on the CPU: hal_ops' kernels over torch against the reference, and against torch's own function.

Both sides of each ratio are measured in one run, in turns, and the best of their times is taken, so that a machine that
is busy elsewhere moves both. ``python benchmarks/cpu_attention.py [--threads N] [--seconds S]``
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from hal_ops.attention import AttentionRequest, reference, torch_sdpa
from hal_ops.attention.cases import make_case

LLAMA = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
SMALL = {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64}
CACHE = {"page_size": 16, "kv_layout": "NHD"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    phase: str
    request: dict[str, Any]
    lengths: tuple[tuple[int, int], ...]
    form: str = "ragged"


ROWS = (
    Row("dense, 1 token", "prefill", SMALL, ((1, 1),), "dense"),
    Row("dense, 2 x 256", "prefill", LLAMA, ((256, 256),) * 2, "dense"),
    Row("dense, 512, float16", "prefill", {**SMALL, "dtype": "float16"}, ((512, 512),), "dense"),
    Row("dense, 1024, window 128, sinks", "prefill", {**SMALL, "window": 128, "sinks": True}, ((1024, 1024),), "dense"),
    Row("dense, 512, alibi", "prefill", {**SMALL, "alibi": True}, ((512, 512),), "dense"),
    Row("ragged, 24 of 5 to 63", "prefill", SMALL, tuple((5 + 7 * i % 59,) * 2 for i in range(24))),
    Row("chunk, 128 of 1024", "extend", LLAMA, ((128, 1024),)),
    Row("mixed, 1 chunk of 256 and 8 decodes", "extend", SMALL, ((256, 512), *((1, 500 + 9 * i) for i in range(8)))),
    Row("decode, 1 x 1024", "decode", LLAMA, ((1, 1024),)),
    Row("decode, 8 x 512", "decode", LLAMA, ((1, 512),) * 8),
    Row("decode, 16 of 100 to 700", "decode", SMALL, tuple((1, 100 + 40 * i) for i in range(16))),
    Row("decode, 8 x 512, HND", "decode", {**LLAMA, "kv_layout": "HND"}, ((1, 512),) * 8),
    Row("decode, 8 x 512, heads alone", "decode", {**LLAMA, "num_kv_heads": 32}, ((1, 512),) * 8),
    Row("decode, 8 x 512, 4 queries", "decode", {**LLAMA, "max_q_len": 4}, ((4, 512),) * 8),
    Row("decode, 8 x 512, float8_e4m3fn", "decode", {**LLAMA, "kv_dtype": "float8_e4m3fn"}, ((1, 512),) * 8),
)


def best_times(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The shortest time of each call in seconds, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def calls_of(row: Row, dtype: str) -> dict[str, Callable[[], Any]]:
    """The row's calls by name; ``torch`` is torch's own function, where one call of it means the same."""
    request = AttentionRequest(**{"dtype": dtype, **CACHE, **row.request})
    case = make_case(request, row.phase, lengths=row.lengths, form=row.form)
    calls: dict[str, Callable[[], Any]] = {}
    for name, module in (("ours", torch_sdpa), ("reference", reference)):
        implementation = getattr(module, row.phase)(request, "cpu")
        args = case.args if row.phase == "prefill" else (*case.args, implementation.plan(case.args[3]))
        calls[name] = lambda f=implementation, a=args: f(*a, **case.kwargs)
    if row.form == "dense" and not (request.sinks or request.alibi):
        q, k, v = (x.transpose(1, 2) for x in case.args)
        gqa, scale, sdpa = request.group_size > 1, request.softmax_scale, functional.scaled_dot_product_attention
        calls["torch"] = lambda: sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="a row")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, best times in us")
    for dtype in options.dtypes.split(","):
        print(f"\n{dtype:38} {'ours':>10} {'reference':>10} {'ratio':>7} {'torch':>10} {'ratio':>7}")
        for row in ROWS:
            with torch.inference_mode():
                times = best_times(calls_of(row, dtype), options.seconds)
            ours, slow, own = (1e6 * times.get(name, float("nan")) for name in ("ours", "reference", "torch"))
            print(f"{row.name:38} {ours:10.1f} {slow:10.1f} {slow / ours:7.1f} {own:10.1f} {own / ours:7.2f}")


if __name__ == "__main__":
    main()
