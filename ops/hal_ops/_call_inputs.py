"""What is wrong with the arguments of a call: a text for each, empty where nothing is. See :attr:`hal_ops.Op.check`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaps", "mismatch", "numbers", "rows_apart", "shown"]


def mismatch(name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """How ``x`` differs from a tensor of this shape and dtype on this device."""
    if isinstance(x, Tensor) and x.shape == shape and x.dtype == dtype and x.device == device:
        return ""
    return f"{name} is {shown(x)}, and should be {str(dtype).removeprefix('torch.')} {tuple(shape)} on {device}"


def gaps(name: str, x: Tensor) -> str:
    """That numbers do not lie behind each other."""
    return "" if x.is_contiguous() else f"{name} has strides {x.stride()}: give a contiguous one"


def numbers(name: str, x: object, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> str:
    """How ``x`` differs from a contiguous tensor of whole numbers in this shape, in one of these formats."""
    if isinstance(x, Tensor) and x.shape == shape and x.dtype in dtypes and x.device == device:
        return gaps(name, x)
    formats = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{name} is {shown(x)}, and should be {formats} {tuple(shape)} on {device}"


def rows_apart(**tensors: Tensor) -> str:
    """That the elements of a head do not lie behind each other."""
    for name, x in tensors.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name}'s last stride is {x.stride(-1)}: give a contiguous last dim"
    return ""


def shown(x: object) -> str:
    """A tensor by what is compared of it; anything else by its type."""
    if not isinstance(x, Tensor):
        return "missing" if x is None else f"a {type(x).__name__}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
