"""Steps of plans that keep their buffers, given to an implementation.

A replay of a captured call is the first call made again: with the same tensors, filled anew, and the numbers that it was
captured with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hal._plan import Buffers, make_step
from hal_ops import resolve_target, torch_dtype
from hal_ops.attention import ATTENTION, AttentionRequest, Step
from hal_ops.kv_layout import arranged, vector_of

__all__ = ["empty_steps", "replays", "smaller_steps"]

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
    q, caches, table = _tensors(request, 3, tokens)
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


def smaller_steps(
    build: Callable[[AttentionRequest], Any], request: AttentionRequest
) -> Iterator[tuple[Tensor, Tensor]]:
    """(found, right) for steps of one and two rows in an eager plan for four, with q as long as its rows and longer."""
    (phase,) = request.phases or ()
    implementation, size = build(request), int(request.page_size)
    right = resolve_target(ATTENTION.reference[phase])(request, CPU)
    buffers = Buffers(4, 4 * request.max_q_len + 2, PAGES, CPU)
    q, caches, table = _tensors(request, 4, buffers.sizes["max_tokens"])
    q.normal_()
    for q_lens, kv_lens in (([1, 1], [9, 3]), ([1], [20]), ([request.max_q_len] * 2, [9, 30])):
        step = make_step(q_lens, kv_lens, table[: len(q_lens)], size, CPU)
        fixed, count = buffers.fill(step), sum(q_lens)
        for given in (q[:count], q):
            found = implementation(given, *caches, fixed, implementation.plan(fixed))
            assert found.shape[0] == len(given)
            yield found[:count], right(q[:count], *caches, step, None)


def _tensors(request: AttentionRequest, rows: int, tokens: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Queries of zeros, filled caches, and a table of all of their pages."""
    dtype, shape = torch_dtype(request.dtype), (request.num_kv_heads, request.head_dim)
    k, v = (torch.randn(rows * PAGES, int(request.page_size), *shape).to(dtype) for _ in "kv")
    caches = arranged(k, request.kv_layout, vector_of(request.kv_dtype)), arranged(v, request.kv_layout, 1)
    q = torch.zeros(tokens, request.num_q_heads, request.head_dim, dtype=dtype)
    return q, caches, torch.randperm(rows * PAGES).int().view(rows, PAGES)


def empty_steps(size: int) -> Iterator[tuple[Step, int]]:
    """(step without queries, tokens that q has nevertheless): no rows, rows that have none, and plans with room."""
    none = torch.zeros(0, 1, dtype=torch.int32)
    yield make_step([], [], none, size, CPU), 0
    yield make_step([0, 0], [0, 0], torch.zeros(2, 1, dtype=torch.int32), size, CPU), 0
    room = Buffers(2, 2, 1, CPU)
    yield room.fill(make_step([], [], none, size, CPU)), 0
    yield room.fill(make_step([], [], none, size, CPU)), 2
