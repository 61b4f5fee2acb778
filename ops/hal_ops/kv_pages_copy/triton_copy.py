"""The copy of pages of a paged cache in Triton.

What :func:`kv_pages_copy` honours: every format, any heads, dims and page size, both layouts, caches of any strides with
a contiguous last dim; deterministic; graph.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned
from hal_ops.kv_pages_copy.op import KvPagesCopyRequest

__all__ = ["constants_of", "copy_kernel", "kv_pages_copy"]

_BLOCK = 4096
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize_on_alignment=["source", "target"])
def copy_kernel(
    cache, source, target, page_stride, outer_stride, inner_stride,
    OUTER: tl.constexpr, INNER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: ``(pages * BLOCKS,)``. A page is ``[OUTER, INNER, DIM]``."""
    program = tl.program_id(0)
    pair = program // BLOCKS
    at = tl.load(source + pair).to(tl.int64)
    to = tl.load(target + pair).to(tl.int64)
    if (at < 0) | (to < 0):
        return
    e = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    offsets = (
        (e // (INNER * DIM)).to(tl.int64) * outer_stride + (e // DIM % INNER).to(tl.int64) * inner_stride + e % DIM
    )
    mask = e < OUTER * INNER * DIM
    values = tl.load(cache + at * page_stride + offsets, mask=mask)
    tl.store(cache + to * page_stride + offsets, values, mask=mask)


def kv_pages_copy(request: KvPagesCopyRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase."""
    where, bits = gpu_of(device).device, _BITS[torch_dtype(request.kv_dtype).itemsize]
    copies = [_Copy(request, dim, where) for dim in (request.head_dim, request.v_head_dim)]

    def call(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"source is {source.dtype} {tuple(source.shape)}, target {target.dtype} {tuple(target.shape)}: they are "
                "pairs of page numbers"
            )
        if len(source):
            for copy, cache in zip(copies, (k_cache, v_cache), strict=True):
                copy(cache.view(bits), source, target)

    return call


class _Copy:
    """The copy inside the cache of keys, or of values."""

    def __init__(self, request: KvPagesCopyRequest, dim: int, device: torch.device) -> None:
        constants = constants_of(request, dim)
        self._blocks = constants["BLOCKS"]
        self._launch = Launch(copy_kernel, lambda key: constants, device, num_warps=4)

    def __call__(self, cache: Tensor, source: Tensor, target: Tensor) -> None:
        strides = cache.stride()
        key = (aligned(cache), source.dtype, strides)
        self._launch(len(source) * self._blocks, key, cache, source, target, *strides[:3])


def constants_of(request: KvPagesCopyRequest, dim: int) -> dict[str, Any]:
    """The constants of the kernel, in its order."""
    rows = (request.page_size, request.num_kv_heads)
    outer, inner = rows if request.kv_layout == "NHD" else rows[::-1]
    blocks = -(-outer * inner * dim // _BLOCK)
    return {"OUTER": outer, "INNER": inner, "DIM": dim, "BLOCK": _BLOCK, "BLOCKS": blocks}
