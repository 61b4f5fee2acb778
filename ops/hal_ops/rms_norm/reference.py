"""The oracle of RMS normalisation: the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._torch_rows import deliver, wide_format
from hal_ops.rms_norm.op import RmsNormRequest
from hal_ops.rows import empty_like

__all__ = ["normalized", "outputs", "rms_norm"]


def outputs(request: RmsNormRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    return empty_like


def normalized(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """The formula, in the format of ``x`` and ``weight``."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + weight_offset)


def rms_norm(
    request: RmsNormRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the output in the format of the sums."""
    wide = wide_format(request.dtype, accumulate)

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        result = normalized(x.to(wide), weight.to(wide), request.eps, request.weight_offset)
        return deliver(result, x.dtype if rounded else wide, out)

    return call
