"""How flashinfer's kernels read memory: 16 bytes at a time, and behind 32-bit products of rows and strides.

Read from 0.6.13, and seen on an H200: rows of ``norm.cuh`` (``bx * stride_input``), of ``cascade.cuh`` and of fa2's queries,
keys and outputs (``q_indptr[request_idx] * q_stride_n`` in ``prefill.cuh``; ``decode.cuh``) are found in uint32, so that
past 2**32 elements other rows are read and written, without a word; those of ``layernorm`` in int32, and so were those of
the CuTe norms of earlier versions (flashinfer#3391). The gates, ``pos_enc.cuh``, ``page.cuh`` and fa3 count in 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["FAR", "LAST", "aligned", "parts_in_reach", "readable", "refuse_far", "refuse_many"]

LAST = 15
"""Bits of an address that are 0 at multiples of 16 bytes. Rows of 16-bit elements here are a multiple of that."""
FAR = 1 << 31
"""Elements that norms and merges are given at most, from the first to the last: as many as signed products reach."""
_FAR_QUERIES = 1 << 32
"""The same for attention, whose products are unsigned."""


def aligned(x: Tensor) -> bool:
    """Whether every row of the last dim begins at a multiple of 16 bytes."""
    places = x.data_ptr()
    for stride in x.stride()[:-1]:
        places |= stride * x.itemsize
    return not places & LAST


def readable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its rows begin elsewhere."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _reach(x: Tensor) -> int:
    """Elements from the first one to behind the last."""
    return 1 + sum((count - 1) * stride for count, stride in zip(x.shape, x.stride(), strict=True))


def parts_in_reach(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors that have their leading dims in common, in parts so small that each can be reached."""
    if max(map(_reach, tensors)) < FAR:
        yield tensors
        return
    first = tensors[0]
    spans = [max((x.shape[dim] - 1) * x.stride(dim) for x in tensors) for dim in range(first.dim() - 1)]
    dim = spans.index(max(spans))
    half = first.shape[dim] // 2
    yield from parts_in_reach(*(x.narrow(dim, 0, half) for x in tensors))
    yield from parts_in_reach(*(x.narrow(dim, half, x.shape[dim] - half) for x in tensors))


def refuse_far(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
    """Refuse tensors that fa2 cannot reach.

    Raises:
        ValueError: one lies over 2**32 elements or more.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None:
            _refuse(_reach(x), f"{name} {tuple(x.shape)} with strides {tuple(x.stride())} lies over")


def refuse_many(tokens: int, heads: int, dim: int) -> None:
    """Refuse a step of which fa2 cannot reach the queries, keys or outputs, even without gaps.

    Raises:
        ValueError: they have 2**32 elements or more.
    """
    _refuse(tokens * heads * dim, f"{tokens} tokens of {heads} heads of {dim} have")


def _refuse(elements: int, what: str) -> None:
    if elements >= _FAR_QUERIES:
        raise ValueError(
            f"{what} {elements} elements, and flashinfer's fa2 kernels multiply rows by strides in 32 bits: "
            "give fewer tokens at a time, or force another library"
        )
