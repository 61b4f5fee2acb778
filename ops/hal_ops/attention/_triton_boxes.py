"""What Hopper's copy engine is told about keys and values: tensors as rows of tokens, and boxes of such rows."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import language as tl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hal_ops.attention._triton_features import cut

__all__ = ["boxes_of"]

_UNIT = 16
"""Strides have to be multiples of this many elements, so that Triton knows that rows are aligned."""
_FORMATS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A tensor ``[outer, tokens, heads, dim]`` as rows, one token stride apart.

    Token t of outer o and head h is row ``o * outer_rows + h * head_rows + t``, from column ``h * head_columns`` on.
    """

    outer_rows: int
    head_rows: int
    head_columns: int
    rows: int
    columns: int


@lru_cache(maxsize=4096)
def _rows_of(sizes: tuple[int, ...], strides: tuple[int, ...]) -> _Rows | None:
    """None if the strides do not nest, or are not aligned."""
    outer, tokens, heads, dim = sizes
    outer_stride, stride, head_stride, _ = strides
    if not all(sizes) or stride <= 0 or head_stride <= 0 or any(s % _UNIT for s in strides[:3]):
        return None
    if outer > 1 and (outer_stride <= 0 or outer_stride % stride):
        return None
    outer_rows = outer_stride // stride if outer > 1 else 0
    if head_stride % stride == 0:
        head_rows, head_columns, columns = head_stride // stride, 0, dim
    elif (heads - 1) * head_stride + dim <= stride:
        head_rows, head_columns, columns = 0, head_stride, (heads - 1) * head_stride + dim
    else:
        return None
    rows = (outer - 1) * outer_rows + (heads - 1) * head_rows + tokens
    return _Rows(outer_rows, head_rows, head_columns, rows, columns) if rows < 2**31 else None


@lru_cache(maxsize=64)
def _layout(block: tuple[int, int], dtype: torch.dtype) -> NVMMASharedLayout:
    return NVMMASharedLayout.get_default_for(list(block), _FORMATS[dtype])


def boxes_of(x: Tensor, block_n: int) -> tuple[Any, ...] | None:
    """The kernel's arguments about x ``[outer, tokens, heads, dim]``: two boxes, and rows and columns to step by.

    The second box is of the rest of a head dim that is no power of two; else x stands for it. None if the copy engine
    cannot copy from x.
    """
    if x.data_ptr() % 16:
        return None
    rows = _rows_of(tuple(x.shape), x.stride())
    if rows is None:
        return None
    sizes, strides = [rows.rows, rows.columns], [x.stride(1), 1]

    def box(width: int) -> Any:
        layout = _layout((block_n, width), x.dtype)
        return TensorDescriptor(x, sizes, strides, [block_n, width], layout)

    return (
        *(box(width) if width else x for width in cut(x.shape[3])),
        rows.outer_rows,
        rows.head_rows,
        rows.head_columns,
    )
