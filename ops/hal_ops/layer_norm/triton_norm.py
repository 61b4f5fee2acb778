"""Layer normalisation in one Triton kernel, see :mod:`hal_ops._triton_norm`.

What :func:`layer_norm` honours: ``dtype`` float32, bfloat16, float16; any hidden size and eps; weight and bias
or neither, in any of these; deterministic; graph. It has no backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._triton_norm import NormRows
from hal_ops.layer_norm.op import LayerNormRequest
from hal_ops.layer_norm.reference import check_affine
from hal_ops.rows import check_input, check_out, check_weight, refuse_grad

__all__ = ["layer_norm"]


def layer_norm(request: LayerNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    hidden, dtype, weight_dtype = request.hidden_size, torch_dtype(request.dtype), torch_dtype(request.weight_dtype)
    normalize = NormRows(device, hidden, request.eps, center=True, weight=request.weight, bias=request.bias)

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if any(y is not None and y.requires_grad for y in (x, weight, bias)):
            refuse_grad()
        check_input("x", x, hidden, dtype)
        check_affine(request, weight, bias)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                check_weight(name, value, hidden, weight_dtype)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        else:
            check_out("out", out, x.shape, dtype)
        normalize(x, out, weight, bias)
        return out

    return call
