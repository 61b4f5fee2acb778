"""What becomes of a captured call when its plan is filled with other steps: the first call is made again, with the same
tensors, and with the numbers that it was captured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hal._plan import Buffers, make_step
from hal_ops import resolve_target, torch_dtype
from hal_ops.attention import ATTENTION, AttentionRequest
from hal_ops.kv_layout import arranged, vector_of

__all__ = ["replays"]

CPU = torch.device("cpu")
PAGES = 8
Lengths = tuple[Sequence[int], Sequence[int]]


def replays(
    build: Callable[[AttentionRequest], Any], request: AttentionRequest, steps: Sequence[Lengths]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(replayed, right) for each step but the first, which is captured; its rows are 3 at most, with 40 tokens in all.

    ``build`` makes an implementation of the request's only phase.
    """
    (phase,) = request.phases or ()
    implementation = build(request.replace(graph=True))
    right = resolve_target(ATTENTION.reference[phase])(request, CPU)
    size = int(request.page_size)
    tokens, most = (40, 40) if phase == "extend" else (3 * request.max_q_len, request.max_q_len)
    buffers = Buffers(3, tokens, PAGES, CPU, most)
    table = torch.randperm(3 * PAGES).int().view(3, PAGES)
    dtype = torch_dtype(request.dtype)
    k, v = (torch.randn(3 * PAGES, size, request.num_kv_heads, request.head_dim).to(dtype) for _ in "kv")
    caches = arranged(k, request.kv_layout, vector_of(request.kv_dtype)), arranged(v, request.kv_layout, 1)
    q = torch.zeros(tokens, request.num_q_heads, request.head_dim, dtype=dtype)
    held: tuple[Any, ...] = ()
    payload: Any = None
    for q_lens, kv_lens in steps:
        step = make_step(q_lens, kv_lens, table[: len(q_lens)], size, CPU)
        fixed, count = buffers.fill(step), sum(q_lens)
        q.normal_()
        if not held:
            payload = implementation.plan(fixed)
            held = fixed, payload
            implementation(q, *caches, *held)
            continue
        payload = implementation.update(fixed, payload) if hasattr(implementation, "update") else payload
        yield implementation(q, *caches, *held)[:count], right(q[:count], *caches, step, None)
