"""What the Triton kernels of ops over rows share: the place of a row, block sizes, alignment."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["aligned", "block_size", "row_start"]


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Elements before row ``row``, 64 bits; see :class:`hal_ops.rows.Rows`."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


def block_size(elements: int, least: int = 16) -> int:
    """The power of two that holds so many elements, at least ``least``."""
    return max(1 << max(elements - 1, 0).bit_length(), least)


def aligned(*tensors: Tensor) -> bool:
    """Whether all addresses are multiples of 16 bytes, which Triton compiles for."""
    together = 0
    for x in tensors:
        together |= x.data_ptr()
    return not together & 15
