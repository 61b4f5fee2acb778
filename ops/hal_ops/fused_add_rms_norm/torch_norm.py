"""The residual sum and its RMS normalisation by torch's operators. Any device; autograd passes through.

What :func:`fused_add_rms_norm` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size, eps and weight
offset; a weight in any of these; inputs of any strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import deliver
from hal_ops.fused_add_rms_norm.op import FusedAddRmsNormRequest
from hal_ops.rms_norm.torch_norm import normalizer

__all__ = ["fused_add_rms_norm"]


def fused_add_rms_norm(request: FusedAddRmsNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    dtype, needs_grad = torch_dtype(request.dtype), request.needs_grad
    normalize = normalizer(request.dtype, request.eps, request.weight_offset, needs_grad)

    def call(x: Tensor, residual: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        total = _separate(residual, x) if needs_grad else residual.add_(x)
        return deliver(normalize(total, weight), dtype, out)

    return call


def _separate(residual: Tensor, x: Tensor) -> Tensor:
    """The sum as a tensor of its own: the backward needs it after the next layer has changed the residual."""
    total = residual + x
    residual.copy_(total)
    return total
