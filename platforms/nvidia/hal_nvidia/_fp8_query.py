"""Queries in FP8, for kernels that read an FP8 cache with nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest, Step

__all__ = ["quantizer"]


def quantizer(request: AttentionRequest, device: hal.Device) -> Callable[[Tensor, Step], tuple[Tensor, Tensor]]:
    """q to the cache's format with one scale a call: ``(q, step) -> (values, scale [1])``.

    Tokens past the step's, for which a captured graph has room, may hold anything, and have no part in the scale.
    """
    quantize = hal.get_op(
        "fp8_quantize", hidden_size=request.head_dim, dtype=request.dtype, fp8_dtype=request.kv_dtype,
        granularity="tensor", device=device,
    ).fn  # fmt: skip

    def call(q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if request.graph:
            past = torch.arange(q.shape[0], device=q.device) >= step.cu_seqlens_q[-1]
            q = q.masked_fill(past[:, None, None], 0.0)
        found: tuple[Tensor, Tensor] = quantize(q)
        return found

    return call
