"""Layer normalisation by torch's own operator. Any device; autograd passes through.

What :func:`layer_norm` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size and eps; weight and bias
or neither, in any of these; inputs of any strides; deterministic; graph: nothing waits for the device.

``torch.nn.functional.layer_norm`` sums half formats in float32 and rounds once (``aten/src/ATen/native/cpu/
layer_norm_kernel.cpp`` and ``cuda/layer_norm_kernel.cu``), but takes weights of another format on the CPU only; those
are computed in float32 here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import by_parts, deliver, wide_format
from hal_ops.layer_norm.op import LayerNormRequest

__all__ = ["layer_norm"]


def layer_norm(request: LayerNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    hidden, dtype, eps = request.hidden_size, torch_dtype(request.dtype), request.eps
    mixed, wide = request.weight_dtype != request.dtype, wide_format(request.dtype)

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if mixed:
            x, weight, bias = x.to(wide), _wide(weight, wide), _wide(bias, wide)
        return deliver(by_parts(lambda rows: functional.layer_norm(rows, (hidden,), weight, bias, eps), x), dtype, out)

    return call


def _wide(x: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(wide)
