"""The SiLU gate in one Triton kernel, see :mod:`hal_ops._triton_gate`.

What :func:`silu_and_mul` honours: ``dtype`` float32, bfloat16, float16; any hidden size; deterministic; graph. It has
no backward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hal_ops._triton_gate import triton_gate
from hal_ops.silu_and_mul.op import SiluAndMulRequest

__all__ = ["silu_and_mul"]


def silu_and_mul(request: SiluAndMulRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase."""
    return triton_gate(request, device, "silu")
