"""The GELU gate by torch's operators. Any device; autograd passes through.

What :func:`gelu_and_mul` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size; both formulas;
inputs of any strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from hal_ops._gate import torch_gate
from hal_ops.gelu_and_mul.op import GeluAndMulRequest

__all__ = ["gelu_and_mul"]


def gelu_and_mul(request: GeluAndMulRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    return torch_gate(request, functools.partial(functional.gelu, approximate=request.approximate))
