"""torch's AOTriton operators behind the contract: one factory a kernel of :mod:`hal_rocm.sdpa_kernels`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_ops.attention import AttentionRequest
from hal_rocm._shared import Prefill, nothing

__all__ = ["efficient", "flash"]

_CAUSAL_FROM_TOP_LEFT = 1
"""``CustomMaskType`` of ``_efficient_attention_forward``."""

Square = Callable[[Tensor, Tensor, Tensor, bool], "tuple[Tensor, Tensor]"]
Found = tuple[Tensor, "Tensor | None"]


def flash(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``aten::_flash_attention_forward``."""
    forward, scale, causal = torch.ops.aten._flash_attention_forward, request.softmax_scale, request.causal

    def square(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale)
        return out, lse

    def alike(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward(q, k, v, cu, cu, longest, longest, 0.0, causal, False, scale=scale)
        return out, _by_heads(lse, cu, q.shape[0])

    return Prefill(request, _Dense(request, square), _Ragged(request, square, alike))


def efficient(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``aten::_efficient_attention_forward``."""
    forward, scale, group = torch.ops.aten._efficient_attention_forward, request.softmax_scale, request.group_size

    def square(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        if group > 1:  # declared in Kernel.copies
            k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        mask = _CAUSAL_FROM_TOP_LEFT if causal else 0
        out, lse, *_ = forward(q, k, v, None, None, None, None, None, 0.0, mask, True, scale=scale)
        return out, lse[..., : q.shape[1]]

    return Prefill(request, _Dense(request, square), _Ragged(request, square, None))


class _Dense:
    """Sequences of one length: q ``[n, q_len, heads, dim]``, all of which see a key; LSE ``[n, heads, q_len]``."""

    def __init__(self, request: AttentionRequest, square: Square) -> None:
        self._causal = request.causal
        self._square = square

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None, with_lse: bool
    ) -> Found:
        q_len, missing = q.shape[1], k.shape[1] - q.shape[1]
        if not (self._causal and missing and q_len > 1):
            out, lse = self._square(q, k, v, self._causal and q_len > 1)
            return out, lse
        out, lse = self._square(functional.pad(q, (0, 0, 0, 0, missing, 0)), k, v, True)
        return out[:, missing:], lse[..., missing:]


class _Ragged:
    """``alike`` where queries and keys have the same lengths; else neighbours of equal lengths as dense batches."""

    def __init__(self, request: AttentionRequest, square: Square, alike: Any) -> None:
        self._request = request
        self._alike = alike
        self._batch = Prefill(request, _Dense(request, square), _never)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        sinks: Tensor | None,
        slopes: Tensor | None,
        with_lse: bool,
    ) -> Found:
        if cu_q is cu_k and self._alike is not None:
            out, lse = self._alike(q, k, v, cu_q, max_q)
            return out, lse
        parts = [self._batch(*part, return_lse=True) for part in _runs(q, k, v, cu_q.tolist(), cu_k.tolist())]
        if not parts:
            out, none = nothing(q, self._request, None, with_lse)
            return out, None if none is None else none.t()
        out = torch.cat([out.flatten(0, 1) for out, _ in parts])
        return out, torch.cat([lse.flatten(0, 1) for _, lse in parts]).t()


def _never(*arguments: Any) -> Found:
    raise AssertionError("a dense batch is not ragged")


def _runs(q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Neighbours of equal lengths as dense batches; sequences without queries are left out."""
    pairs = zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
    lengths = [(q_to - q_from, k_to - k_from) for (q_from, q_to), (k_from, k_to) in pairs]
    first = 0
    for (q_len, kv_len), same in itertools.groupby(lengths):
        count = len(list(same))
        if q_len:
            sizes = ((q, cu_q[first], q_len), (k, cu_k[first], kv_len), (v, cu_k[first], kv_len))
            a, b, c = (x[at : at + count * n].view(count, n, *x.shape[1:]) for x, at, n in sizes)
            yield a, b, c
        first += count


def _by_heads(lse: Tensor, cu: Tensor, tokens: int) -> Tensor:
    """``[heads, tokens]`` from ``[sequences, heads, longest]``, which AOTriton writes; CK writes the former."""
    if lse.dim() == 2:
        return lse
    tokens_of = torch.arange(tokens, device=cu.device)
    rows = torch.bucketize(tokens_of, cu[1:], right=True).clamp_max_(lse.shape[0] - 1)
    return lse[rows, :, (tokens_of - cu[rows]).clamp_max_(lse.shape[2] - 1)].t()
