"""The oracle of the quantisation to FP8: group by group, by the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest

__all__ = ["Pair", "SMALLEST_SCALE", "fp8_quantize", "outputs", "scales_shape"]

Pair = tuple[Tensor, Tensor]
SMALLEST_SCALE = 2.0**-126


def scales_shape(request: Fp8QuantizeRequest, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an x of ``shape``."""
    if request.granularity == "tensor":
        return (1,)
    if request.granularity == "token":
        return (*shape[:-1], 1)
    columns = -(-shape[-1] // request.block_size)
    if request.block_rows == 1:
        return (*shape[:-1], columns)
    return (-(-shape[0] // request.block_rows), columns)


def outputs(request: Fp8QuantizeRequest) -> Callable[..., Pair]:
    """Makes empty outputs from the call's arguments."""
    dtype = torch_dtype(request.fp8_dtype)

    def empty(x: Tensor, scale: Tensor | None = None) -> Pair:
        scales = x.new_empty(scales_shape(request, tuple(x.shape)), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=dtype), scales

    return empty


def fp8_quantize(
    request: Fp8QuantizeRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Pair]:
    """The ``call`` phase. ``accumulate`` is the format of the quotient; values and scales are always rounded."""
    wide = accumulate or torch.float32
    most = torch.finfo(torch_dtype(request.fp8_dtype)).max
    empty = outputs(request)

    def call(x: Tensor, scale: Tensor | None = None, *, out: Pair | None = None) -> Pair:
        values, scales = empty(x) if out is None else out
        for group, one in _groups(request, x.shape):
            part = x[group].to(wide)
            if scale is None:
                known = part.abs()[part.isfinite()]
                top = known.max() if known.numel() else torch.zeros((), dtype=wide)
                scales[one] = (top / most).clamp_min(SMALLEST_SCALE)
            else:
                scales[one] = scale[one]
            values[group] = (part / scales[one].to(wide)).clamp(-most, most).to(values.dtype)
        return values, scales

    return call


def _groups(request: Fp8QuantizeRequest, shape: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """Index of each group in x, and of its scale."""
    if request.granularity == "tensor":
        return [((...,), (0,))]
    rows = list(torch.cartesian_prod(*(torch.arange(n) for n in shape[:-1])).reshape(-1, len(shape) - 1).tolist())
    if request.granularity == "token":
        return [((*row, slice(None)), (*row, 0)) for row in rows]
    size, tall = request.block_size, request.block_rows
    columns = [(slice(size * j, size * (j + 1)), j) for j in range(-(-shape[-1] // size))]
    if tall == 1:
        return [((*row, part), (*row, j)) for row in rows for part, j in columns]
    return [
        ((slice(tall * i, tall * (i + 1)), part), (i, j)) for i in range(-(-shape[0] // tall)) for part, j in columns
    ]
