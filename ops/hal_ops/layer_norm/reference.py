"""The oracle of layer normalisation: the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._torch_rows import deliver, wide_format
from hal_ops.layer_norm.op import LayerNormRequest
from hal_ops.rows import empty_like

__all__ = ["layer_norm", "outputs"]


def outputs(request: LayerNormRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    return empty_like


def layer_norm(
    request: LayerNormRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the output in the format of the sums."""
    wide = wide_format(request.dtype, accumulate)

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        deviation = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
        result = deviation / (deviation.square().mean(-1, keepdim=True) + request.eps).sqrt()
        result = result if weight is None else result * weight.to(wide)
        result = result if bias is None else result + bias.to(wide)
        return deliver(result, x.dtype if rounded else wide, out)

    return call
