"""What flash-attention's versions have in common: window sentinels, rows without keys, lengths, gradients that lie far."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hal_ops.attention import AttentionRequest, Step

__all__ = [
    "as_ragged",
    "has_far_gradients",
    "longest_query",
    "nothing",
    "sequences_of",
    "window_of",
    "with_step",
    "without_keys",
    "without_tail",
]

_FAR_GRADIENTS = 1 << 31
_QUERY_TILE, _DIM_TILE = 128, 64


def window_of(request: AttentionRequest) -> tuple[int, int]:
    """``(left, right)`` with -1 for an unlimited side."""
    left, right = request.window
    return (-1 if left is None else left, -1 if right is None else right)


def longest_query(q: Tensor, cu_seqlens_q: Tensor, given: int | None) -> int:
    """The bound on the query lengths of a ragged call.

    With a bound of 1, flash-attention 2 takes one query in *every* row for granted, and reshapes q by that
    (``mha_varlen_fwd``, ``seqlenq_ngroups_swapped``).
    """
    longest = given or q.shape[0]
    return longest if longest > 1 or q.shape[0] == cu_seqlens_q.shape[0] - 1 else 2


def has_far_gradients(q: Tensor, request: AttentionRequest) -> bool:
    """Whether flash-attention 2 would lose its way in the gradients of a dense q ``[batch, len, heads, dim]``.

    It finds those of a sequence, summed in float32, by an offset in 32 bits, and stops with an illegal access
    (flash-attention#1500 and #2260; seen with torch 2.11.0 on an H200). Its ragged form counts in 64 bits.
    """
    if not request.needs_grad:
        return False
    batch, length, heads, dim = q.shape
    tiles = -(-length // _QUERY_TILE) * -(-dim // _DIM_TILE)
    return batch * heads * tiles * _QUERY_TILE * _DIM_TILE >= _FAR_GRADIENTS


def as_ragged(call: Any, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None) -> Any:
    """A dense call in the ragged form. No request asks for gradients and the LSE."""
    (batch, q_len), kv_len = q.shape[:2], k.shape[1]
    rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out = call(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=rows * q_len, cu_seqlens_k=rows * kv_len,
        max_seqlen_q=q_len, max_seqlen_k=kv_len, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return out.unflatten(0, (batch, q_len))


def with_step(call: Any, step: Step) -> Any:
    """``call`` with the lengths of a step whose keys are its queries' own. The bound on its queries is never 1: q may hold
    as many tokens as there are rows, and others than one of each (see :func:`longest_query`)."""
    cumulative, longest = step.cu_seqlens_q, step.max_q_len
    lengths = {"cu_seqlens_q": cumulative, "cu_seqlens_k": cumulative}
    return partial(call, **lengths, max_seqlen_q=max(2, longest), max_seqlen_k=longest)


def without_tail(v: Tensor, cumulative: Tensor) -> Tensor:
    """A copy of v ``[tokens, heads, dim]`` with zeros behind the last sequence.

    flash-attention 3 and 4 read whole tiles, and multiply what lies behind a sequence by 0: NaN and infinity there reach
    its rows (flash-attention#2374; both seen on an H200). A captured graph has room there, which may hold anything.
    """
    past = (torch.arange(v.shape[0], device=v.device) >= cumulative[-1])[:, None, None]
    if v.itemsize == 1:
        return v.view(torch.uint8).masked_fill(past, 0).view(v.dtype)
    return v.masked_fill(past, 0.0)


def sequences_of(numbers: Tensor, cumulative: Tensor) -> Tensor:
    """The sequence of each token, int64, without waiting for the device. What lies behind the last one, where a plan of
    fixed size has room, counts as the last one's."""
    rows = torch.searchsorted(cumulative[1:].contiguous(), numbers, right=True)
    return rows.clamp_max(cumulative.shape[0] - 2)


def without_keys(lse: Tensor) -> Tensor:
    """The LSE with -inf where flash-attention 2 says +inf, in place: rows that see no key."""
    return lse.masked_fill_(lse == torch.inf, -torch.inf)


def nothing(
    q: Tensor, v_head_dim: int, return_lse: bool, dtype: torch.dtype | None = None, sinks: Tensor | None = None
) -> Any:
    """The outcome where there is no key at all, or no query: zeros (in q's format, or ``dtype``), and an LSE of -inf, or
    of the sinks."""
    out = q.new_zeros((*q.shape[:-1], v_head_dim), dtype=dtype)
    if not return_lse:
        return out
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    return out, lse if sinks is None else lse.copy_(sinks)
