"""RMS normalisation by torch's operators. Any device; autograd passes through.

What :func:`rms_norm` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size, eps and weight offset; a
weight in any of these; inputs of any strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import by_parts, deliver, wide_format
from hal_ops.rms_norm.op import RmsNormRequest

__all__ = ["normalizer", "rms_norm"]


def rms_norm(request: RmsNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    dtype = torch_dtype(request.dtype)
    normalize = normalizer(request.dtype, request.eps, request.weight_offset, request.needs_grad)

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        return deliver(normalize(x, weight), dtype, out)

    return call


def normalizer(dtype: str, eps: float, offset: float, needs_grad: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of x and the weight that gives the norm, rounded or not yet. Without gradients it saves temporaries.

    Where torch has a kernel for it (``aten::_fused_rms_norm``, on GPUs; it sums in float32 and rounds once), that is it.
    """
    wide, fused = wide_format(dtype), not offset and _has_fused()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.to(wide), weight.to(wide)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * scale * (weight + offset if offset else weight)

    def lean(x: Tensor, weight: Tensor) -> Tensor:
        if fused and x.is_cuda and x.dtype == weight.dtype:
            return by_parts(lambda rows: functional.rms_norm(rows, weight.shape, weight, eps), x)
        x = x.to(wide)
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x * scale).mul_(weight.to(wide) + offset if offset else weight)

    return plain if needs_grad else lean


def _has_fused() -> bool:
    """Whether this build has that kernel: without it ``functional.rms_norm`` is several operators, and rounds in between."""
    known = hasattr(torch.ops.aten, "_fused_rms_norm")
    return known and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA")
