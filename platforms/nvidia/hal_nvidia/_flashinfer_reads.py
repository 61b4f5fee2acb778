"""What flashinfer's kernels for rows, heads and pages want of memory: they read and write 16 bytes at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["aligned", "readable"]

_BYTES = 16


def aligned(x: Tensor) -> bool:
    """Whether every row of the last dim begins at a multiple of 16 bytes."""
    places = x.data_ptr()
    for stride in x.stride()[:-1]:
        places |= stride * x.itemsize
    return places % _BYTES == 0


def readable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its rows begin elsewhere."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)
