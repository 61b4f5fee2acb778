"""The arguments that ops over rows share: what is wrong with them, as a text. See :attr:`hal_ops.Op.check`.

Each is asked at every call, so what is right costs five comparisons: a contiguous tensor has no strides to look at, and
formats are objects of which there is one each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._call_inputs import gaps, mismatch, rows_apart, shown
from hal_ops._dtypes import torch_dtype
from hal_ops.rows import unfolded

__all__ = ["Looks", "pair", "read", "row", "spread", "vector", "written"]

Looks = Callable[[str, object], str]
"""A function of an argument's name and value that says how it differs from what was bound."""


def read(last: tuple[int, ...], dtype: str, device: torch.device) -> Looks:
    """``[..., *last]`` in ``dtype`` on ``device``: the last dim contiguous, leading dims that fold into two."""
    kept, width, form = len(last), last[-1], torch_dtype(dtype)
    wanted = f"{dtype} [..., {', '.join(map(str, last))}] on {device}"

    def problem(name: str, x: object) -> str:
        if isinstance(x, Tensor) and x.dtype is form and x.device == device:
            shape = x.shape
            if shape[-kept:] == last if kept > 1 else shape and shape[-1] == width:
                return "" if x.is_contiguous() else _strides(name, x, kept)
        return f"{name} is {shown(x)}, and should be {wanted}"

    return problem


def vector(size: int, dtype: str, device: torch.device) -> Looks:
    """A contiguous ``[size]``: of one element it would be repeated, and of too few read past its end."""
    shape, form = (size,), torch_dtype(dtype)

    def problem(name: str, x: object) -> str:
        if isinstance(x, Tensor) and x.shape == shape and x.dtype is form and x.device == device:
            return gaps(name, x)
        return mismatch(name, x, shape, form, device)

    return problem


def row(
    name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, kept: int = 1
) -> str:
    """As :func:`read`, of one shape."""
    if isinstance(x, Tensor) and x.shape == shape and x.dtype is dtype and x.device == device:
        return "" if x.is_contiguous() else _strides(name, x, kept)
    return mismatch(name, x, shape, dtype, device)


def written(
    name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, kept: int = 1
) -> str:
    """A tensor that a call fills: as :func:`row`, and no element of it in two places."""
    wrong = row(name, x, shape, dtype, device, kept=kept)
    assert wrong or isinstance(x, Tensor)
    return wrong or spread(name, x)  # type: ignore[arg-type]


def spread(name: str, x: Tensor) -> str:
    """That what is written would stand in several places at once."""
    if x.is_contiguous() or not any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return ""
    return f"{name} is {tuple(x.shape)} with strides {x.stride()}: its rows share memory; give {name}.clone()"


def pair(out: object, names: str) -> str:
    """That an ``out`` of two tensors is none."""
    if isinstance(out, (tuple, list)) and len(out) == 2:
        return ""
    found = f"{len(out)} values" if isinstance(out, (tuple, list)) else shown(out)
    return f"out is {found}, and should be a pair of tensors, {names}"


def _strides(name: str, x: Tensor, kept: int) -> str:
    return rows_apart(**{name: x}) or unfolded(name, x, kept)
