"""Numbers of a plan on their way from the host to a device, without waiting for what runs there.

A copy from pageable memory goes through the driver's own pinned memory. Up to 64 KiB the call returns once the bytes are
there; with more of them "the driver may synchronize with the stream" first (CUDA runtime API, *API synchronization
behavior*), which is all of the step before. From pinned memory nothing waits. torch's allocator of it gives memory out again
only when the copies from it that were asked for with ``non_blocking=True`` have run.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["STAGED", "staged"]

STAGED = 64 << 10
"""Bytes up to which a copy from pageable memory does not wait."""


def staged(x: Tensor, device: torch.device, *, own: bool = True) -> Tensor:
    """``x``, a host tensor, as what ``to(device, non_blocking=True)`` and ``copy_`` are to be given.

    Args:
        own: nobody else writes to x. Else it is copied: what its owner pinned may be read long after the call.
    """
    if device.type != "cuda" or not x.is_cpu:
        return x
    if x.numel() * x.itemsize > STAGED:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return x if own else x.clone()
