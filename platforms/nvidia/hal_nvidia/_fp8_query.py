"""Queries in FP8, for kernels that read an FP8 cache with nothing else."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest

__all__ = ["quantizer"]


def quantizer(request: AttentionRequest, device: hal.Device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """q to the cache's format with one scale a call: ``q -> (values, scale [1])``."""
    made = hal.get_op(
        "fp8_quantize", hidden_size=request.head_dim, dtype=request.dtype, fp8_dtype=request.kv_dtype,
        granularity="tensor", device=device,
    )  # fmt: skip
    found: Callable[[Tensor], tuple[Tensor, Tensor]] = made.fn
    return found
