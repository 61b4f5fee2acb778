"""The GELU gate in one Triton kernel, see :mod:`hal_ops._triton_gate`.

What :func:`gelu_and_mul` honours: ``dtype`` float32, bfloat16, float16; any hidden size; both formulas; deterministic;
graph. It has no backward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hal_ops._triton_gate import triton_gate
from hal_ops.gelu_and_mul.op import GeluAndMulRequest

__all__ = ["gelu_and_mul"]


def gelu_and_mul(request: GeluAndMulRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    return triton_gate(request, device, "gelu_tanh" if request.approximate == "tanh" else "gelu")
