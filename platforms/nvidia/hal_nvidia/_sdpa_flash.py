"""torch's flash-attention 2, dense and ragged, by the operator that ``torch.nn.attention.varlen`` calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia._flash import as_ragged, has_far_gradients, longest_query, nothing, window_of, with_step, without_keys
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, PrefillAttention, Step
from hal_ops.attention.reference import check_tensors

__all__ = ["prefill"]

forward = torch.ops.aten._flash_attention_forward.default


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    return _Prefill(request)


class _Prefill:
    def __init__(self, request: AttentionRequest) -> None:
        left, right = window_of(request)
        self._request = request
        self._causal = request.causal
        self._settings = {"scale": request.softmax_scale, "window_size_left": left, "window_size_right": right}

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The operator with the lengths of this shape."""
        longest_q, longest_k, causal, settings = q.size(1), k.size(1), self._causal, self._settings
        if not q.numel() or not k.numel() or has_far_gradients(q, self._request):
            return self
        refuse_wide(q.shape[0], "sdpa_flash")
        return lambda q, k, v: forward(q, k, v, None, None, longest_q, longest_k, 0.0, causal, False, **settings)[0]

    def for_step(self, step: Step) -> Any:
        """The operator with the step's lengths, where a call can have nothing more."""
        refuse_wide(step.batch, "sdpa_flash")
        cumulative, longest, causal, settings = step.cu_seqlens_q, step.max_q_len, self._causal, self._settings
        if self._request.return_lse or not longest:
            return with_step(self, step)
        bound = max(longest, 2)  # see longest_query
        return lambda q, k, v: forward(
            q, k, v, cumulative, cumulative, bound, longest, 0.0, causal, False, **settings
        )[0]  # fmt: skip

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
        if sinks is not None or alibi_slopes is not None:
            check_tensors(self._request, sinks, alibi_slopes)
        if not q.numel() or not k.numel():
            return nothing(q, self._request.v_head_dim, return_lse)
        if cu_seqlens_q is None and has_far_gradients(q, self._request):
            return as_ragged(self, q, k, v)
        refuse_wide(q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, "sdpa_flash")
        if cu_seqlens_q is None:
            longest_q, longest_k = q.size(1), k.size(1)
        else:
            longest_q, longest_k = longest_query(q, cu_seqlens_q, max_seqlen_q), max_seqlen_k or k.shape[0]
        found = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, 0.0, self._causal, False, **self._settings
        )
        return (found[0], without_keys(found[1].transpose(-1, -2))) if return_lse else found[0]
