"""torch_musa behind the contracts: ``scaled_dot_product_attention``, ``rms_norm`` and ``swish_glu`` over muDNN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_ops import torch_dtype
from hal_ops.attention import AttentionRequest, Step, masks
from hal_ops.attention.gather import Gather, Group, plan_groups
from hal_ops.attention.reference import check_tensors
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.silu_and_mul import SiluAndMulRequest

__all__ = ["decode", "extend", "prefill", "rms_norm", "silu_and_mul"]

_TILE = 1024
"""Queries a mask covers at most, so that masks stay small where windows hide most keys."""


def prefill(request: AttentionRequest, device: hal.Device) -> _Prefill:
    """One call a batch of equal lengths, else one a sequence."""
    return _Prefill(request)


def extend(request: AttentionRequest, device: hal.Device) -> _Paged:
    """Over the gathered keys of rows of like lengths."""
    return _Paged(request)


def decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """The same as :func:`extend`."""
    return _Paged(request)


class _Fused:
    """Attention of equally long sequences by torch's function."""

    def __init__(self, request: AttentionRequest) -> None:
        self._limits = masks.sides(request.causal, request.window)
        self._v_head_dim = request.v_head_dim
        self._gqa = request.group_size > 1
        # Builds for MUSA before 4.2 warn about the default scale, when it is passed, and raise for any other.
        self._scale = None if request.is_neutral("softmax_scale") else request.softmax_scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        """q ``[n, q_len, heads, head_dim]`` over k and v ``[n, kv_len, kv_heads, dim]``.

        ``hidden`` ``[n, 1, 1, kv_len]`` is added to the scores; it leaves each row a key.
        """
        q_len, kv_len = q.shape[1], k.shape[1]
        skipped = masks.empty_rows(q_len, kv_len, self._limits[1])
        nothing = q.new_zeros((q.shape[0], skipped, q.shape[2], self._v_head_dim))
        parts = [nothing] if skipped or not q_len else []
        at_once = self._rows_at_once(q_len, kv_len)
        for first in range(skipped, q_len, at_once):
            last = min(q_len, first + at_once) - 1
            low, high = masks.key_range(first, last, q_len, kv_len, self._limits)
            seen = None if hidden is None else hidden[..., low:high]
            part = q[:, first : last + 1], k[:, low:high], v[:, low:high]
            parts.append(self._tile(*part, first + kv_len - q_len - low, seen))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _rows_at_once(self, q_len: int, kv_len: int) -> int:
        square = q_len == kv_len and self._limits == (None, 0)
        return max(1, q_len) if square or self._all_seen(q_len, kv_len, kv_len - q_len) else _TILE

    def _all_seen(self, rows: int, columns: int, offset: int) -> bool:
        left, right = self._limits
        return (right is None or columns - 1 - offset <= right) and (left is None or offset + rows - 1 <= left)

    def _tile(self, q: Tensor, k: Tensor, v: Tensor, offset: int, hidden: Tensor | None) -> Tensor:
        rows, columns = q.shape[1], k.shape[1]
        # is_causal is aligned to the first key in muDNN's other kernel (SDP.cpp), and undocumented in this one.
        square = rows == columns and offset == 0 and self._limits == (None, 0) and hidden is None
        mask = None if square or self._all_seen(rows, columns, offset) else self._mask(q, rows, columns, offset)
        if hidden is not None:
            hidden = hidden.to(q.dtype).expand(-1, 1, rows, -1)
            mask = hidden if mask is None else hidden + mask
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            is_causal=square,
            scale=self._scale,
            enable_gqa=self._gqa,
        )
        return out.transpose(1, 2)

    def _mask(self, q: Tensor, rows: int, columns: int, offset: int) -> Tensor:
        """0 where a key is seen, -inf elsewhere, in q's format: what torch_musa's tests pass."""
        seen = masks.visible(masks.relative(rows, columns, offset, q.device), self._limits)
        return q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


class _Prefill:
    """The prefill phase. A ragged batch of different lengths waits for the device, to read them."""

    def __init__(self, request: AttentionRequest) -> None:
        self._request = request
        self._attend = _Fused(request)

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
    ) -> Tensor:
        check_tensors(self._request, sinks, alibi_slopes)
        if return_lse:
            raise ValueError("torch_musa returns no LSE: ask for it in the request, and another kernel is chosen")
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return self._attend(q, k, v)
        batch = cu_seqlens_q.shape[0] - 1
        if q.numel() and (len(q), len(k)) == (batch * (max_seqlen_q or 0), batch * (max_seqlen_k or 0)):
            return self._attend(*(x.view(batch, -1, *x.shape[1:]) for x in (q, k, v))).flatten(0, 1)
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        rows = zip(*(torch.split(x, n) for x, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))), strict=True)
        none = q.new_empty((0, q.shape[1], self._request.v_head_dim))
        return torch.cat([none, *(self._attend(*(x.unsqueeze(0) for x in row)).squeeze(0) for row in rows)])


class _Paged:
    """The extend and decode phases."""

    def __init__(self, request: AttentionRequest) -> None:
        self._request = request
        self._dtype = torch_dtype(request.dtype)
        self._attend = _Fused(request)
        self._gather = Gather(request, self._dtype)

    def plan(self, step: Step) -> list[Group]:
        """Which rows are attended to together, and where their keys lie."""
        return plan_groups(step, self._request, self._dtype)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: list[Group],
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        check_tensors(self._request, sinks, alibi_slopes)
        if return_lse or k_scale is not None or v_scale is not None:
            raise ValueError("torch_musa returns no LSE, and reads no FP8 cache: give neither return_lse nor scales")
        out = q.new_empty((*q.shape[:2], self._request.v_head_dim))
        for group in payload:
            k, v = self._gather(k_cache, group), self._gather(v_cache, group)
            out[group.tokens] = self._attend(group.queries(q), k, v, group.hidden).flatten(0, 1)
        return out


def rms_norm(request: RmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``torch.rms_norm``, which torch_musa sends to muDNN's fused operator."""
    hidden, eps = request.hidden_size, request.eps

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _delivered(torch.rms_norm(x, (hidden,), weight, eps), out)

    return call


def silu_and_mul(request: SiluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``swish_glu``, an operator that torch_musa adds to torch: silu of the first half, times the second."""
    fused = torch.swish_glu  # type: ignore[attr-defined]

    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _delivered(fused(x), out)

    return call


def _delivered(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
