"""The oracle: attention by its formula, one sequence at a time. Honours every field of the request, on any device.

For one query at position ``p`` (aligned to the end of the keys) and one head::

    s_j  = softmax_scale * q.k_j
    s_j  = softcap * tanh(s_j / softcap)                 if softcap
    s_j  = s_j - slope * |j - p|                         if alibi
    out  = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))
    lse  = log(sum_j exp(s_j) + exp(sink))               the sink's term only if sinks

over the keys that the query sees. A row that sees none gives out 0 and lse -inf (with sinks: lse = sink).

Nothing is computed in less than ``accumulate``: float32, or float64 if the request's dtype is. Slots that no query
sees are never read into the sums, so NaN there changes nothing. prefill is differentiable, its lse too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.attention import masks
from hal_ops.attention.contract import PagedAttention, PrefillAttention, Step, check_tensors
from hal_ops.attention.request import AttentionRequest
from hal_ops.kv_layout import by_token

__all__ = ["attend", "check_tensors", "decode", "extend", "prefill"]

_SCORES_AT_ONCE = 1 << 24


def prefill(
    request: AttentionRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> PrefillAttention:
    """The prefill phase. ``rounded=False`` leaves the output in ``accumulate``."""
    accumulate = accumulate or _sums_of(request)

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
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(request, sinks, alibi_slopes)
        if is_fp8(request.qkv_dtype):
            q = _widened(q, q_scale, request.group_size, accumulate)
            k, v = _widened(k, k_scale, 1, accumulate), _widened(v, v_scale, 1, accumulate)
        dense = cu_seqlens_q is None
        if cu_seqlens_q is None or cu_seqlens_k is None:
            sequences = list(zip(q, k, v, strict=True))
        else:
            q_lens, k_lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
            sequences = list(zip(torch.split(q, q_lens), torch.split(k, k_lens), torch.split(v, k_lens), strict=True))
        pairs = [attend(*three, request, sinks, alibi_slopes, accumulate=accumulate) for three in sequences]
        out, lse = _join(pairs, q, request, accumulate)
        if dense:
            out, lse = out.view(*q.shape[:-1], request.v_head_dim), lse.view(q.shape[:-1])
        out, lse = (out.to(torch_dtype(request.dtype)), lse.float()) if rounded else (out, lse)
        return (out, lse) if return_lse else out

    return call


def _widened(x: Tensor, scale: Tensor | None, group_size: int, accumulate: torch.dtype) -> Tensor:
    """FP8 values ``[..., heads, dim]`` times their scale, which is of all heads or one for each ``group_size`` of them."""
    wide = x.to(accumulate)
    if scale is None:
        return wide
    factors = scale.to(accumulate)
    return wide * (factors.repeat_interleave(group_size) if factors.numel() > 1 else factors).view(-1, 1)


class _Paged:
    """The extend and decode phases: each row's keys are picked out of the cache, then attended to."""

    def __init__(self, request: AttentionRequest, accumulate: torch.dtype, rounded: bool) -> None:
        self.request = request
        self.accumulate = accumulate
        self.rounded = rounded

    def plan(self, step: Step) -> None:
        return None

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        pairs = []
        for row, queries in enumerate(torch.split(q, list(step.q_lens))):
            seen = step.q_lens[row], step.kv_lens_host[row]
            k = self._read(k_cache, k_scale, step, row, *seen)
            v = self._read(v_cache, v_scale, step, row, *seen)
            pairs.append(attend(queries, k, v, self.request, sinks, alibi_slopes, accumulate=self.accumulate))
        out, lse = _join(pairs, q, self.request, self.accumulate)
        out, lse = (out.to(q.dtype), lse.float()) if self.rounded else (out, lse)
        return (out, lse) if return_lse else out

    def _read(self, cache: Tensor, scale: Tensor | None, step: Step, row: int, q_len: int, kv_len: int) -> Tensor:
        """The last keys of a row, ``[tokens, num_kv_heads, dim]``: those that some query sees, and no other slot."""
        limits = masks.sides(self.request.causal, self.request.window)
        low, _ = masks.key_range(0, q_len - 1, q_len, kv_len, limits)
        size = step.page_size
        pages = step.block_table[row, low // size : -(-kv_len // size)].long()
        bits = cache.view(torch.uint8) if is_fp8(self.request.kv_dtype) else cache
        found = by_token(bits[pages], self.request.kv_layout).flatten(3)
        start = low // size * size
        tokens = found.flatten(0, 1)[low - start : kv_len - start].view(cache.dtype).to(self.accumulate)
        return tokens if scale is None else tokens * scale.to(self.accumulate).view(-1, 1)


def extend(
    request: AttentionRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> PagedAttention:
    """The extend phase. ``rounded=False`` leaves the output in ``accumulate``."""
    return _Paged(request, accumulate or _sums_of(request), rounded)


def decode(
    request: AttentionRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> PagedAttention:
    """The decode phase: the same as :func:`extend`."""
    return _Paged(request, accumulate or _sums_of(request), rounded)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence: q ``[q_len, num_q_heads, head_dim]``, k and v ``[kv_len, num_kv_heads, dim]``.

    Returns ``(out, lse)`` in ``accumulate``: ``[q_len, num_q_heads, v_head_dim]`` and ``[q_len, num_q_heads]``.
    """
    rows = max(1, _SCORES_AT_ONCE // max(1, k.shape[0] * request.num_q_heads))
    k, v = (x.to(accumulate).transpose(0, 1) for x in (k, v))
    sinks = None if sinks is None else sinks.to(accumulate).view(-1, 1, 1)
    shift = k.shape[1] - q.shape[0]
    pairs = [
        _rows(part.to(accumulate).transpose(0, 1), k, v, index * rows + shift, request, sinks, alibi_slopes)
        for index, part in enumerate(torch.split(q, rows))
    ]
    return torch.cat([out for out, _ in pairs], 1).transpose(0, 1), torch.cat([lse for _, lse in pairs], 1).t()


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: int,
    request: AttentionRequest,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Some queries of a sequence, the first at ``position``; all three are ``[heads, rows or keys, dim]``.

    The query heads of one head of keys are multiplied with it as if they were more queries.
    """
    heads, rows, dim = q.shape
    limits = masks.sides(request.causal, request.window)
    low, high = masks.key_range(position, position + rows - 1, k.shape[1], k.shape[1], limits)
    k, v = k[:, low:high], v[:, low:high]
    scores = q.reshape(k.shape[0], request.group_size * rows, dim) @ k.transpose(1, 2)
    scores = scores.mul_(request.softmax_scale).view(heads, rows, high - low)
    if request.softcap:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if slopes is not None or limits != (None, None):
        distance = masks.relative(rows, high - low, position - low, q.device)
        if slopes is not None:
            scores = scores + masks.alibi_bias(distance, slopes, scores.dtype)
        scores = scores.masked_fill_(~masks.visible(distance, limits), -torch.inf)
    return _softmax(scores, v, sinks)


def _softmax(scores: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    heads, rows, keys = scores.shape
    top = scores.detach().amax(-1, keepdim=True) if keys else scores.new_full((heads, rows, 1), -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (top + torch.log(total)).masked_fill(nothing, -torch.inf)
    out = weights.view(v.shape[0], heads // v.shape[0] * rows, keys) @ v
    return out.view(heads, rows, v.shape[2]) / total, lse.squeeze(-1)


def _join(
    pairs: list[tuple[Tensor, Tensor]], q: Tensor, request: AttentionRequest, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All tokens' out and lse, ``[tokens, heads, dim]`` and ``[tokens, heads]``."""
    none = q.new_zeros((0, request.num_q_heads), dtype=dtype)
    out = torch.cat([none.unsqueeze(-1).expand(-1, -1, request.v_head_dim), *(out for out, _ in pairs)])
    return out, torch.cat([none, *(lse for _, lse in pairs)])


def _sums_of(request: AttentionRequest) -> torch.dtype:
    return torch.float64 if request.dtype == "float64" else torch.float32
