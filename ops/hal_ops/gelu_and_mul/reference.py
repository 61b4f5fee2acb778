"""The oracle of the GELU gate: the formulas. Any device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._gate import gate_reference
from hal_ops.gelu_and_mul.op import GeluAndMulRequest
from hal_ops.rows import half_of

__all__ = ["gelu_and_mul", "outputs"]


def outputs(request: GeluAndMulRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    return half_of


def gelu_and_mul(
    request: GeluAndMulRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the output in the format of the sums."""
    activation = _with_tanh if request.approximate == "tanh" else _with_erf
    return gate_reference(request, activation, accumulate, rounded)


def _with_erf(z: Tensor) -> Tensor:
    return z / 2 * (1 + torch.erf(z / math.sqrt(2)))


def _with_tanh(z: Tensor) -> Tensor:
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
