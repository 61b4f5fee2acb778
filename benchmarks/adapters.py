"""What an adapter costs on the host, over calling its library directly with the same tensors. Needs the device.

    python benchmarks/adapters.py [--json benchmarks/results/adapters-<machine>.json]

Both calls are measured turn by turn in one process, on shapes so small that the device never holds the host up. Figures
are medians in microseconds; the budget is 2 us.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hal

BUDGET = 2.0
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}

Call = Callable[[], Any]


def microseconds(call: Call, loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    passed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return passed / loops * 1e6


def in_turns(direct: Call, adapter: Call, loops: int = 100, rounds: int = 61) -> dict[str, float]:
    """Medians of both, and the median of the differences of neighbouring rounds."""
    times: list[tuple[float, float]] = []
    for _ in range(3):
        microseconds(direct, loops)
        microseconds(adapter, loops)
    for _ in range(rounds):
        times.append((microseconds(direct, loops), microseconds(adapter, loops)))
    first, second = (statistics.median(x) for x in zip(*times, strict=True))
    return {"direct": first, "adapter": second, "added": statistics.median(b - a for a, b in times)}


def tensors(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def torch_operators() -> dict[str, tuple[Call, Call]]:
    q, k, v = tensors(16)
    cu = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    ragged = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 16, "max_seqlen_k": 16}
    made = {n: hal.get_attention(**BASE, phases="prefill", kernel=f"sdpa_{n}") for n in ("flash", "efficient", "cudnn")}
    run = {name: handle.implementation("prefill") for name, handle in made.items()}
    scale = made["flash"].request.softmax_scale
    flash = torch.ops.aten._flash_attention_forward.default
    efficient = torch.ops.aten._efficient_attention_forward.default
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    sides = {"scale": scale, "window_size_left": -1, "window_size_right": -1}
    q3, k3, v3 = q[0], k[0], v[0]
    return {
        "sdpa_flash.prefill dense": (
            lambda: flash(q, k, v, None, None, 16, 16, 0.0, True, False, **sides)[0],
            lambda: run["flash"](q, k, v),
        ),
        "sdpa_flash.prefill ragged": (
            lambda: flash(q3, k3, v3, cu, cu, 16, 16, 0.0, True, False, **sides)[0],
            lambda: run["flash"](q3, k3, v3, **ragged),
        ),
        "sdpa_efficient.prefill dense": (
            lambda: efficient(q, k, v, None, None, None, None, None, 0.0, 2, False, scale=scale)[0],
            lambda: run["efficient"](q, k, v),
        ),
        "sdpa_cudnn.prefill dense": (
            lambda: cudnn(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, False, 0.0, True, False, scale=scale
            )[0].transpose(1, 2),
            lambda: run["cudnn"](q, k, v),
        ),
    }


def flash_attention(name: str) -> dict[str, tuple[Call, Call]]:
    """flash-attention 2 or 3, fresh keys and cached ones."""
    page = 256 if name == "fa2" else 16
    handle = hal.get_attention(**BASE, page_size=page, kernel=name)
    cache = handle.allocate_kv_cache(8)
    q, k, v = tensors(4)
    plan = handle.plan(q_lens=[1] * 4, kv_lens=[16] * 4, block_table=[[0], [1], [2], [3]])
    step, payload = plan._step, plan._payload
    prefill, decode = handle.implementation("prefill"), handle.implementation("decode")
    options = {"softmax_scale": handle.request.softmax_scale, "causal": True, "window_size": (-1, -1), "softcap": 0.0}
    direct: tuple[Call, Call]
    if name == "fa2":
        import flash_attn.flash_attn_interface as library

        direct = (
            lambda: library.flash_attn_func(q, k, v, **options),
            lambda: library.flash_attn_with_kvcache(
                q[0].unflatten(0, (4, 1)), cache.k, cache.v, cache_seqlens=step.kv_lens, block_table=step.block_table,
                **options,
            ).flatten(0, 1),
        )  # fmt: skip
    else:
        import flash_attn_interface as library

        direct = (
            lambda: library.flash_attn_func(q, k, v, **options),
            lambda: library.flash_attn_with_kvcache(
                q[0], cache.k, cache.v, cache_seqlens=step.kv_lens, page_table=step.block_table,
                cu_seqlens_q=step.cu_seqlens_q, max_seqlen_q=payload.longest, scheduler_metadata=payload.metadata,
                **options,
            ),
        )  # fmt: skip
    return {
        f"{name}.prefill dense": (direct[0], lambda: prefill(q, k, v)),
        f"{name}.decode": (direct[1], lambda: decode(q[0], cache.k, cache.v, step, payload)),
        f"{name}.decode, through the handle": (direct[1], lambda: handle(q[0], cache=cache, plan=plan)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pairs = torch_operators()
    for name, distributions in (("fa2", ("flash-attn",)), ("fa3", ("flash-attn-3", "tokenspeed-fa3"))):
        if any(hal.installed(d) for d in distributions):
            pairs.update(flash_attention(name))
    found = {name: in_turns(*pair) for name, pair in pairs.items()}
    for name, figures in found.items():
        verdict = "ok" if figures["added"] <= BUDGET else "OVER"
        print(
            f"{name:<36}{figures['direct']:8.2f} us direct {figures['adapter']:8.2f} us adapted "
            f"{figures['added']:+7.2f} us  {verdict}"
        )
    if options.json:
        device = hal.device()
        names = ("torch", "tokenspeed-fa3", "flash-attn-3", "flash-attn")
        libraries = {name: str(v) for name in names if (v := hal.installed(name))}
        about = {"device": device.identity(), "python": platform.python_version(), "libraries": libraries}
        text = json.dumps({**about, "budget_us": BUDGET, "command": " ".join(sys.argv), "us": found}, indent=1)
        options.json.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
