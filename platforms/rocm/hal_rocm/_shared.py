"""What the adapters of flash-attention's shape have in common: windows, LSEs, and rows that see no key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops.attention import AttentionRequest, masks

__all__ = ["Prefill", "mask_of", "nothing", "settled", "unseeing", "window_of"]

Found = tuple[Tensor, "Tensor | None"]


def window_of(request: AttentionRequest) -> tuple[int, int]:
    """``(left, right)`` with -1 for unlimited, as flash-attention counts."""
    left, right = (-1 if side is None else side for side in request.window)
    return left, right


def mask_of(request: AttentionRequest) -> dict[str, Any]:
    """Causality and window together. A right side of 0 is causality, however it was asked for."""
    causal = masks.sides(request.causal, request.window)[1] == 0
    return {"causal": causal, "window_size": (window_of(request)[0], -1) if causal else window_of(request)}


def unseeing(cu_q: Tensor, cu_k: Tensor, tokens: int, right: int | None) -> Tensor:
    """Which tokens of a ragged call see no key, bool ``[tokens]``; ``right`` limits their window."""
    places = torch.arange(tokens, device=cu_q.device)
    rows = torch.bucketize(places, cu_q[1:], right=True)
    kv_lens = cu_k.diff()[rows]
    found = kv_lens == 0
    return found if right is None else found | (places - cu_q[1:][rows] + kv_lens + right < 0)


def settled(lse: Tensor) -> Tensor:
    """The LSE with -inf where a library writes +inf for a row without keys. It has no gradient, and is a tensor of its
    own: the library's backward reads the other one."""
    lse = lse.detach()
    return lse.masked_fill(lse == math.inf, -math.inf)


def nothing(q: Tensor, request: AttentionRequest, sinks: Tensor | None, with_lse: bool) -> Found:
    """Out and LSE of queries ``[..., num_q_heads, head_dim]`` that see no key."""
    out = q.new_zeros((*q.shape[:-1], request.v_head_dim))
    if not with_lse:
        return out, None
    lse = out.new_full(out.shape[:-1], -math.inf, dtype=torch.float32)
    return out, lse if sinks is None else lse.copy_(sinks.expand_as(lse))


class Prefill:
    """The prefill phase over a library's two functions.

    ``dense(q, k, v, sinks, slopes, with_lse)`` takes ``[batch, len, heads, dim]`` and gives the LSE as
    ``[batch, heads, len]``; ``ragged(q, k, v, cu_q, cu_k, max_q, max_k, sinks, slopes, with_lse)`` takes
    ``[tokens, heads, dim]`` and gives it as ``[heads, tokens]``. Dense queries without keys never reach the library.
    """

    def __init__(self, request: AttentionRequest, dense: Callable[..., Found], ragged: Callable[..., Found]) -> None:
        self._request = request
        self._right = masks.sides(request.causal, request.window)[1]
        self._dense = dense
        self._ragged = ragged

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if cu_seqlens_q is None:
            out, lse = self._call_dense(q, k, v, sinks, alibi_slopes, return_lse)
        elif not q.shape[0]:
            out, lse = nothing(q, self._request, sinks, return_lse)
        else:
            out, lse = self._ragged(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, alibi_slopes, return_lse
            )
            lse = None if lse is None else settled(lse).t()
        return (out, lse) if return_lse else out

    def _call_dense(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None, with_lse: bool
    ) -> Found:
        hidden = masks.empty_rows(q.shape[1], k.shape[1], self._right)
        if hidden == q.shape[1] or not q.shape[0]:
            return nothing(q, self._request, sinks, with_lse)
        out, lse = self._dense(q[:, hidden:], k, v, sinks, slopes, with_lse)
        lse = None if lse is None else settled(lse).transpose(1, 2)
        if not hidden:
            return out, lse
        zeros, minus = nothing(q[:, :hidden], self._request, sinks, with_lse)
        return torch.cat([zeros, out], 1), None if lse is None or minus is None else torch.cat([minus, lse], 1)
