"""The SiLU gate by torch's operators. Any device; autograd passes through.

What :func:`silu_and_mul` honours: ``dtype`` float64, float32, bfloat16, float16; any hidden size; inputs of any
strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from hal_ops._gate import torch_gate
from hal_ops.silu_and_mul.op import SiluAndMulRequest

__all__ = ["silu_and_mul"]


def silu_and_mul(request: SiluAndMulRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    return torch_gate(request, functional.silu)
