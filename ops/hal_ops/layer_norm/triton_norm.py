"""Layer normalisation in one Triton kernel, see :mod:`hal_ops._triton_norm`.

What :func:`layer_norm` honours: ``dtype`` float32, bfloat16, float16; any hidden size and eps; weight and bias
or neither, in any of these; deterministic; graph. It has no backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._triton_norm import NormRows
from hal_ops.layer_norm.op import LayerNormRequest
from hal_ops.rows import refuse_grad

__all__ = ["layer_norm"]


def layer_norm(request: LayerNormRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    hidden, eps = request.hidden_size, request.eps
    normalize = NormRows(device, hidden, eps, center=True, weight=request.weight, bias=request.bias)

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if any(y is not None and y.requires_grad for y in (x, weight, bias)):
            refuse_grad()
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        normalize(x, out, weight, bias)
        return out

    return call
