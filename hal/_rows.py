"""Where rows begin in memory: kernels that load 16 bytes at once stop with an error of the device elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hal.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from hal._kernel import Kernel
    from hal._selection import Selection

__all__ = ["check_rows", "strictest"]


def strictest(selection: Selection) -> Kernel | None:
    """Of the kernels of a handle the one whose rows must be aligned the most, if any must."""
    kernels = [choice.kernel for choice in selection.choices.values() if choice.kernel is not None]
    return max((k for k in kernels if k.row_alignment > 1), key=lambda k: k.row_alignment, default=None)


def check_rows(kernel: Kernel | None, tensors: Mapping[str, Tensor]) -> None:
    """Look at the addresses and strides of what a kernel is to be called with. The last dim is contiguous.

    Raises:
        InputError: a row begins where the kernel cannot load it.
    """
    import torch

    if kernel is None or torch.compiler.is_compiling():
        return
    wanted = kernel.row_alignment
    for name, x in tensors.items():
        size, strides = x.itemsize, x.stride()[:-1]
        bits = x.data_ptr()
        for stride in strides:
            bits |= stride * size
        if not bits % wanted:
            continue
        beside = x.data_ptr() % wanted
        apart = [stride * size for stride, count in zip(strides, x.shape, strict=False) if count > 1]
        if not beside and not any(step % wanted for step in apart):
            continue
        found = f"begins {beside} bytes past a multiple of {wanted}" if beside else f"has rows {apart} bytes apart"
        raise InputError(
            f"{name} {tuple(x.shape)} {found}, and {kernel.name} loads {wanted} bytes at once: give {name}.clone("
            "memory_format=torch.contiguous_format), or force a kernel that takes any rows, such as kernel='triton'"
        )
