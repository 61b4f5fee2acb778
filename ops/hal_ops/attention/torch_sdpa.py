"""Attention on the CPU by ``torch.nn.functional.scaled_dot_product_attention``. Run with torch 2.6.0, 2.9.1, 2.13.0.

What the factories here honour, to be declared as constraints, for prefill, extend and decode alike unless said:

======================================  ===============================================================================
num_q_heads, num_kv_heads, group_size   any
head_dim, v_head_dim                    any, equal or not (unequal ones are padded: a copy)
dtype                                   float64, float32, bfloat16, float16 (computed in float32: two to five times
                                        as fast as torch's float16 on CPUs without float16 units, and closer)
kv_dtype                                those four, float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, float8_e5m2fnuz
page_size, kv_layout                    any; NHD, HND
max_q_len                               any
causal, window                          both; limited on the left, on the right, on both sides
sinks, alibi, softmax_scale, kv_scale   yes
return_lse, deterministic               yes
needs_grad                              prefill only; gradients flow through out and lse, to q, k, v, sinks and slopes
softcap, graph                          **no**
======================================  ===============================================================================

The factories raise ``ValueError`` for a request outside this table. Copies: extend and decode gather the keys that are
seen, once a layer; everything else is views, but for padding and for float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._dtypes import FP8_DTYPES, torch_dtype
from hal_ops.attention import _sdpa, masks
from hal_ops.attention.contract import PagedAttention, PrefillAttention, Step, check_tensors
from hal_ops.attention.gather import Gather, Group, plan_groups
from hal_ops.attention.request import AttentionRequest

__all__ = ["DTYPES", "KV_DTYPES", "decode", "extend", "prefill"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Formats of q, k, v and of the output."""
KV_DTYPES = (*DTYPES, *FP8_DTYPES)
"""Formats of the cache."""


def prefill(request: AttentionRequest, device: object) -> PrefillAttention:
    """The prefill phase."""
    _check(request, "prefill")
    general = _Prefill(request)
    if not _is_plain(request):
        return general
    causal, scale, gqa = request.causal, request.softmax_scale, request.group_size > 1
    sdpa = functional.scaled_dot_product_attention

    def one_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale, enable_gqa=gqa
        ).transpose(1, 2)

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
    ) -> Tensor | tuple[Tensor, Tensor]:
        if return_lse or cu_seqlens_q is not None or sinks is not None or alibi_slopes is not None:
            return general(
                q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sinks=sinks, alibi_slopes=alibi_slopes,
                return_lse=return_lse,
            )  # fmt: skip
        return one_length(q, k, v) if q.size(1) == k.size(1) else general(q, k, v)

    def for_dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Any]:
        return one_length if q.size(1) == k.size(1) else general

    setattr(call, "for_dense", for_dense)  # noqa: B010 - functions have no such attribute for mypy
    return call


def extend(request: AttentionRequest, device: object) -> PagedAttention:
    """The extend phase."""
    _check(request, "extend")
    return _Paged(request)


def decode(request: AttentionRequest, device: object) -> PagedAttention:
    """The decode phase."""
    _check(request, "decode")
    return _Paged(request)


class _Prefill:
    """Every prefill that is more than one plain call of torch."""

    def __init__(self, request: AttentionRequest) -> None:
        self.request = request
        self.shape = _sdpa.Shape.of(request)
        self.compute = _compute_dtype(request, request.dtype)

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
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        with_lse = return_lse or sinks is not None
        dtype, (q, k, v) = q.dtype, (x.to(self.compute) for x in (q, k, v))
        if cu_seqlens_q is None or cu_seqlens_k is None:
            out, lse = _sdpa.attend(q, k, v, self.shape, slopes=alibi_slopes, with_lse=with_lse)
        else:
            runs = _runs(cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
            parts = [_sequences(q, k, v, *run) for run in runs] or [_sequences(q, k, v, 1, 0, 0, 0, 0)]
            pairs = [_sdpa.attend(*part, self.shape, slopes=alibi_slopes, with_lse=with_lse) for part in parts]
            out = torch.cat([out.flatten(0, 1) for out, _ in pairs])
            lse = torch.cat([lse.flatten(0, 1) for _, lse in pairs if lse is not None]) if with_lse else None
        return _finish(out, lse, sinks, dtype, return_lse)


class _Paged:
    """The extend and decode phases: rows of like lengths are gathered and attended to together."""

    def __init__(self, request: AttentionRequest) -> None:
        self.request = request
        self.shape = _sdpa.Shape.of(request)
        self.compute = _compute_dtype(request, request.kv_dtype)
        self.gather = Gather(request, self.compute)

    def plan(self, step: Step) -> list[Group]:
        return plan_groups(step, self.request, self.compute)

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
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        with_lse = return_lse or sinks is not None
        dtype, q = q.dtype, self._scaled(q.to(self.compute), k_scale)
        parts = [
            _sdpa.attend(
                group.queries(q),
                self.gather(k_cache, group),
                self.gather(v_cache, group),
                self.shape,
                slopes=alibi_slopes,
                hidden=group.hidden,
                with_lse=with_lse,
            )
            for group in payload
        ]
        out, lse = _assemble(payload, parts, q, self.request, with_lse)
        return _finish(self._scaled(out, v_scale), lse, sinks, dtype, return_lse)

    def _scaled(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x ``[tokens, num_q_heads, dim]`` times the scale of each head's kv head."""
        if scale is None:
            return x
        heads = x.view(x.shape[0], self.shape.kv_heads, self.shape.group, x.shape[2])
        return (heads * scale.to(x.dtype).view(-1, 1, 1)).flatten(1, 2)


def _check(request: AttentionRequest, phase: str) -> None:
    wrong = [
        f"{name} {getattr(request, name)}"
        for name, ok in (
            ("softcap", not request.softcap),
            ("graph", not request.graph),
            ("needs_grad", not request.needs_grad or phase == "prefill"),
            ("dtype", request.dtype in DTYPES),
            ("kv_dtype", request.kv_dtype in KV_DTYPES or phase == "prefill"),
        )
        if not ok
    ]
    if wrong:
        raise ValueError(
            f"torch_sdpa.{phase} does not do {', '.join(wrong)}: use hal_ops.attention.reference, which does everything"
        )


def _is_plain(request: AttentionRequest) -> bool:
    """Whether dense calls of as many queries as keys are one call of torch's function."""
    return (
        masks.sides(request.causal, request.window) == (None, 0 if request.causal else None)
        and not (request.sinks or request.alibi)
        and request.head_dim == request.v_head_dim
        and request.dtype != "float16"
        and (request.group_size == 1 or _sdpa.fused_gqa())
    )


def _compute_dtype(request: AttentionRequest, kv_dtype: str) -> torch.dtype:
    name = request.dtype
    if name == "float16" or (kv_dtype != name and name == "bfloat16"):
        name = "float32"
    found: torch.dtype = torch_dtype(name)
    return found


def _runs(cu_q: list[int], cu_k: list[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Neighbours of equal lengths, as ``(sequences, first and end token of q, first and end token of k)``."""
    lengths = [(b - a, d - c) for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)]
    first = 0
    for _, same in groupby(lengths):
        end = first + len(list(same))
        yield end - first, cu_q[first], cu_q[end], cu_k[first], cu_k[end]
        first = end


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, n: int, q_from: int, q_to: int, k_from: int, k_to: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` neighbours of equal lengths as a dense batch; as one sequence where there are no queries or no keys."""
    n = n if q_to > q_from and k_to > k_from else 1
    q, k, v = q[q_from:q_to], k[k_from:k_to], v[k_from:k_to]
    return (
        q.view(n, q.shape[0] // n, *q.shape[1:]),
        k.view(n, k.shape[0] // n, *k.shape[1:]),
        v.view(n, v.shape[0] // n, *v.shape[1:]),
    )


def _assemble(
    groups: list[Group], parts: list[tuple[Tensor, Tensor | None]], q: Tensor, request: AttentionRequest, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The groups' results in the order of the tokens."""
    if len(groups) == 1 and isinstance(groups[0].tokens, slice):
        out, lse = parts[0]
        return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
    out = q.new_empty((*q.shape[:2], request.v_head_dim))
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)) if with_lse else None
    for group, (part, part_lse) in zip(groups, parts, strict=True):
        out[group.tokens] = part.flatten(0, 1)
        if lse is not None and part_lse is not None:
            lse[group.tokens] = part_lse.flatten(0, 1)
    return out, lse


def _finish(
    out: Tensor, lse: Tensor | None, sinks: Tensor | None, dtype: torch.dtype, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the sinks to the denominator, and rounds."""
    if lse is not None and sinks is not None:
        lowest = torch.finfo(sinks.dtype).min
        out = out * torch.sigmoid(lse - sinks.clamp_min(lowest)).unsqueeze(-1)
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    out = out.to(dtype)
    return (out, lse.float()) if return_lse and lse is not None else out
