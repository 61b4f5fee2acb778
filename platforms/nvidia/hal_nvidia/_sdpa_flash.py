"""torch's flash-attention 2, dense and ragged, by the operator that ``torch.nn.attention.varlen`` calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia._flash import longest_query, nothing, window_of, without_keys
from hal_ops.attention import AttentionRequest, PrefillAttention
from hal_ops.attention.reference import check_tensors

__all__ = ["prefill"]

forward = torch.ops.aten._flash_attention_forward.default


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    causal, scale, (left, right) = request.causal, request.softmax_scale, window_of(request)
    v_head_dim = request.v_head_dim

    def call(
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
        if sinks is not None or alibi_slopes is not None:
            check_tensors(request, sinks, alibi_slopes)
        if not q.numel() or not k.numel():
            return nothing(q, v_head_dim, return_lse)
        if cu_seqlens_q is None:
            longest_q, longest_k = q.size(1), k.size(1)
        else:
            longest_q, longest_k = longest_query(q, cu_seqlens_q, max_seqlen_q), max_seqlen_k or k.shape[0]
        found = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, 0.0, causal, False, scale=scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return (found[0], without_keys(found[1].transpose(-1, -2))) if return_lse else found[0]

    return call
