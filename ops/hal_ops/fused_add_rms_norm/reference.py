"""The oracle of the sum and its normalisation: the two formulas. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._torch_rows import deliver, wide_format
from hal_ops.fused_add_rms_norm.op import FusedAddRmsNormRequest
from hal_ops.rms_norm.reference import normalized
from hal_ops.rows import empty_like

__all__ = ["fused_add_rms_norm", "outputs"]


def outputs(request: FusedAddRmsNormRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    return empty_like


def fused_add_rms_norm(
    request: FusedAddRmsNormRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the output in the format of the sums; the residual is rounded."""
    wide = wide_format(request.dtype, accumulate)

    def call(x: Tensor, residual: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        total = (residual.to(wide) + x.to(wide)).to(residual.dtype)
        residual.copy_(total)
        result = normalized(total.to(wide), weight.to(wide), request.eps, request.weight_offset)
        return deliver(result, x.dtype if rounded else wide, out)

    return call
