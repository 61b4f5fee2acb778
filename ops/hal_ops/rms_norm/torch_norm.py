"""RMS normalisation by torch's operators. Any device; autograd passes through.

What :func:`rms_norm` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size, eps and weight offset; a
weight in any of these; inputs of any strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import deliver, wide_format
from hal_ops.rms_norm.op import RmsNormRequest
from hal_ops.rows import check_input, check_weight

__all__ = ["normalizer", "rms_norm"]


def rms_norm(request: RmsNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    hidden, dtype, weight_dtype = request.hidden_size, torch_dtype(request.dtype), torch_dtype(request.weight_dtype)
    normalize = normalizer(request.dtype, request.eps, request.weight_offset, request.needs_grad)

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        check_input("x", x, hidden, dtype)
        check_weight("weight", weight, hidden, weight_dtype)
        return deliver(normalize(x, weight), dtype, out)

    return call


def normalizer(dtype: str, eps: float, offset: float, needs_grad: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of x and the weight that gives the norm, not rounded yet. Without gradients it saves temporaries."""
    wide = wide_format(dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.to(wide), weight.to(wide)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * scale * (weight + offset if offset else weight)

    def lean(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(wide)
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x * scale).mul_(weight.to(wide) + offset if offset else weight)

    return plain if needs_grad else lean
