"""Prefill kernels that plan from host lengths: once a step, through the front door."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hal
from hal_ops import resolve_target
from hal_ops.attention import ATTENTION

made: list[tuple[int, ...]] = []


def planning(request: Any, device: Any) -> Any:
    """The reference, with a plan of its own for a step."""
    reference = resolve_target(ATTENTION.reference["prefill"])(request, device)

    class Prefill:
        def __call__(
            self, q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
            max_seqlen_q: Any = None, max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None,
            return_lse: bool = False,
        ) -> Any:  # fmt: skip
            return reference(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=return_lse)

        def for_step(self, step: Any) -> Any:
            made.append(step.q_lens)
            return partial(self, cu_seqlens_q=step.cu_seqlens_q, cu_seqlens_k=step.cu_seqlens_q)

    return Prefill()


def test_a_step_is_planned_once_for_all_layers(
    fake_platform: Callable[..., Any], kernel_module: Callable[..., str], attention_kernel: Callable[..., hal.Kernel]
) -> None:  # requirement B8, B10, P38
    made.clear()
    target = f"{kernel_module(planning=planning)}:planning"
    kernels = [attention_kernel("lib.prefill", target=target), attention_kernel("lib.decode")]
    fake_platform(kernels=kernels)
    handle = hal.get_attention(
        num_q_heads=2, num_kv_heads=1, head_dim=64, dtype="float32", page_size=16, phases=("prefill", "decode"),
        device="fake:0",
    )  # fmt: skip
    q, k, v = (torch.randn(8, heads, 64) for heads in (2, 1, 1))
    cache = handle.allocate_kv_cache(4)
    plan = handle.plan(q_lens=[5, 3], kv_lens=[5, 3], block_table=[[0], [1]])
    assert (plan.phase, plan.write) == ("prefill", "after")
    outs = [handle(q, k, v, cache=cache, plan=plan) for _ in range(3)]
    assert made == [(5, 3)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    kept = handle.plan(q_lens=[5, 3], kv_lens=[5, 3], block_table=[[0], [1]], max_batch=2, max_tokens=8)
    kept.update(q_lens=[4, 4], kv_lens=[4, 4], block_table=[[0], [1]])
    assert made == [(5, 3), (5, 3), (4, 4)], "an update plans anew"
    assert not torch.equal(handle(q, k, v, cache=cache, plan=kept), outs[0])
