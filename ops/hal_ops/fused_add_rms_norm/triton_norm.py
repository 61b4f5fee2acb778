"""The residual sum and its RMS normalisation in one Triton kernel, see :mod:`hal_ops._triton_norm`.

What :func:`fused_add_rms_norm` honours: ``dtype`` float32, bfloat16, float16; any hidden size and eps and
weight offset; a weight in any of these; deterministic; graph. It has no backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._triton_norm import NormRows
from hal_ops.fused_add_rms_norm.op import FusedAddRmsNormRequest
from hal_ops.rows import refuse_grad

__all__ = ["fused_add_rms_norm"]


def fused_add_rms_norm(request: FusedAddRmsNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    normalize = NormRows(device, request.hidden_size, request.eps, weight_offset=request.weight_offset, add=True)

    def call(x: Tensor, residual: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if x.requires_grad or residual.requires_grad or weight.requires_grad:
            refuse_grad()
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        normalize(x, out, weight, residual=residual)
        return out

    return call
