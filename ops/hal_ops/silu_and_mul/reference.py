"""The oracle of the SiLU gate: the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._gate import gate_reference
from hal_ops.rows import half_of
from hal_ops.silu_and_mul.op import SiluAndMulRequest

__all__ = ["outputs", "silu_and_mul"]


def outputs(request: SiluAndMulRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    return half_of


def silu_and_mul(
    request: SiluAndMulRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the output in the format of the sums."""
    return gate_reference(request, lambda gate: gate / (1 + (-gate).exp()), accumulate, rounded)
