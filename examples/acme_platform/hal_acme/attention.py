"""The code of Acme's attention, imported when the kernel is chosen. Shapes are those of ``hal_ops.attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest

__all__ = ["prefill"]


def prefill(request: AttentionRequest, device: hal.Device) -> Any:
    """The function for one request. Whatever depends on the request alone is settled here, once."""

    def attend(
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
        if cu_seqlens_q is None or cu_seqlens_k is None:
            out, lse = _attend(q, k, v, request)
        else:
            rows = zip(_slices(cu_seqlens_q), _slices(cu_seqlens_k), strict=True)
            outs, lses = zip(*(_attend(q[i], k[j], v[j], request) for i, j in rows), strict=True)
            out, lse = torch.cat(outs), torch.cat(lses)
        return (out, lse) if return_lse else out

    return attend


def _attend(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Sequences of one length: q ``[..., q_len, num_q_heads, head_dim]``; the result and its LSE."""
    k = k.float().repeat_interleave(request.group_size, dim=-2)
    v = v.float().repeat_interleave(request.group_size, dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", q.float(), k) * request.softmax_scale
    if request.softcap:
        scores = torch.tanh(scores / request.softcap) * request.softcap
    scores = scores.masked_fill(_hidden(q.shape[-3], k.shape[-3], request).to(q.device), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1)).exp()
    out = torch.einsum("...hqk,...khd->...qhd", weights, v)
    return out.to(q.dtype), lse.transpose(-1, -2)


def _hidden(q_len: int, k_len: int, request: AttentionRequest) -> Tensor:
    """Which keys each query may not see, ``[q_len, k_len]``, aligned to the end of the keys."""
    ahead = torch.arange(k_len) - (torch.arange(q_len) + k_len - q_len).unsqueeze(1)
    left, _ = request.window
    hidden = ahead > 0 if request.causal else torch.zeros_like(ahead, dtype=torch.bool)
    return hidden if left is None else hidden | (ahead < -left)


def _slices(cumulative: Tensor) -> list[slice]:
    ends = cumulative.tolist()
    return list(map(slice, ends, ends[1:]))
