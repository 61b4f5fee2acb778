"""torch's cuDNN attention: dense batches, and ragged ones in pieces.

Its causal mask is aligned to the *first* key. So it is used where queries and keys are equally many; elsewhere rows are
cut off that see no key, or q is padded in front until both are equally many. A mask tensor would do as well, but with
one the backward pass gives NaN (pytorch/pytorch#196678).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia._flash import nothing
from hal_ops.attention import AttentionRequest, PrefillAttention
from hal_ops.attention.reference import check_tensors

__all__ = ["prefill"]

forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default

Pair = tuple[Tensor, "Tensor | None"]


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    causal, scale, v_head_dim, needs_grad = (
        request.causal,
        request.softmax_scale,
        request.v_head_dim,
        request.needs_grad,
    )

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
        if cu_seqlens_q is None or cu_seqlens_k is None:
            out, lse = batch(q, k, v, return_lse)
        else:
            out, lse = ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), return_lse)
        return (out, lse) if return_lse else out

    def square(q: Tensor, k: Tensor, v: Tensor, causal: bool, return_lse: bool) -> Pair:
        """One launch, with cuDNN's own mask."""
        q = q.transpose(1, 2)
        found = forward(
            q, k.transpose(1, 2), v.transpose(1, 2), None, return_lse or needs_grad, 0.0, causal, False, scale=scale
        )
        # The LSE has a fourth dim of 1 since torch 2.9.
        return found[0].transpose(1, 2), found[1].reshape(q.shape[:3]).transpose(1, 2) if return_lse else None

    def batch(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Pair:
        """A dense batch, ``[batch, len, heads, dim]``, with any two lengths."""
        q_len, kv_len = q.shape[1], k.shape[1]
        if not causal or q_len == 1 or q_len == kv_len:
            return square(q, k, v, causal and q_len > 1, return_lse)
        if q_len < kv_len:
            more = kv_len - q_len
            out, lse = square(functional.pad(q, (0, 0, 0, 0, more, 0)), k, v, True, return_lse)
            return out[:, more:], None if lse is None else lse[:, more:]
        empty = q_len - kv_len
        out, lse = square(q[:, empty:], k, v, kv_len > 1, return_lse)
        out = functional.pad(out, (0, 0, 0, 0, empty, 0))
        return out, None if lse is None else functional.pad(lse, (0, 0, empty, 0), value=-torch.inf)

    def ragged(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bounds: tuple[Any, Any], return_lse: bool
    ) -> Pair:
        """Rows of one length as a batch; others a call each, for which lengths are read from the device."""
        rows = cu_q.shape[0] - 1
        if rows * (bounds[0] or 0) == q.shape[0] and rows * (bounds[1] or 0) == k.shape[0]:
            out, lse = batch(*(x.view(rows, -1, *x.shape[1:]) for x in (q, k, v)), return_lse)
            return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
        lens = cu_q.diff().tolist(), cu_k.diff().tolist()
        three = zip(torch.split(q, lens[0]), torch.split(k, lens[1]), torch.split(v, lens[1]), strict=True)
        pairs = [sequence(*row, return_lse) for row in three if row[0].shape[0]]
        lse = torch.cat([lse for _, lse in pairs if lse is not None]) if return_lse else None
        return torch.cat([out for out, _ in pairs]), lse

    def sequence(q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Pair:
        if not k.shape[0]:
            found = nothing(q, v_head_dim, True)
            return found[0], found[1] if return_lse else None
        out, lse = batch(q[None], k[None], v[None], return_lse)
        return out[0], None if lse is None else lse[0]

    return call
