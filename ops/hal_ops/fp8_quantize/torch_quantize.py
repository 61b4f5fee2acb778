"""The quantisation to FP8 by torch's operators. Any device.

What :func:`fp8_quantize` honours: ``dtype`` float64, float32, bfloat16, float16; the four FP8 formats; scales a tensor,
token or block of any size, made or given; inputs of any strides; deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import deliver
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest
from hal_ops.fp8_quantize.reference import SMALLEST_SCALE, Pair, scales_shape

__all__ = ["fp8_quantize"]


def fp8_quantize(request: Fp8QuantizeRequest, device: object) -> Callable[..., Pair]:
    """The ``call`` phase."""
    fp8 = torch_dtype(request.fp8_dtype)
    most = torch.finfo(fp8).max

    def call(x: Tensor, scale: Tensor | None = None, *, out: Pair | None = None) -> Pair:
        groups = _grouped(request, x.float())
        scales = _made(groups, most) if scale is None else _shaped(request, groups, scale)
        # torch 2.6.0 turns what is too large for float8_e4m3fn into NaN, and any version does so for the fnuz formats
        values = (groups / scales).clamp_(-most, most).to(fp8)
        v_out, s_out = (None, None) if out is None else out
        shape = scales_shape(request, tuple(x.shape))
        ungrouped = _ungrouped(request, values, x.shape)
        return deliver(ungrouped, fp8, v_out), deliver(_copied(scales, scale).view(shape), torch.float32, s_out)

    return call


def _made(groups: Tensor, most: float) -> Tensor:
    sizes = groups.abs()
    sizes = sizes.masked_fill_(~sizes.isfinite(), 0.0)
    # a tensor without rows has a scale too, and torch has no largest of nothing
    top = sizes.amax((-3, -1), keepdim=True) if groups.shape[1] else sizes.new_zeros(1, 1, 1, 1)
    return (top / most).clamp_min_(SMALLEST_SCALE)


def _grouped(request: Fp8QuantizeRequest, x: Tensor) -> Tensor:
    """``[rows of blocks, rows, columns of blocks, elements]``, padded with zeros; a tensor or token is one block."""
    if request.granularity == "tensor":
        return x.reshape(1, -1, 1, x.shape[-1])
    if request.granularity == "token":
        return x.reshape(-1, 1, 1, x.shape[-1])
    size, tall = request.block_size, request.block_rows
    x = x.reshape(-1, x.shape[-1])
    x = functional.pad(x, (0, -x.shape[1] % size, 0, -x.shape[0] % tall))
    return x.view(x.shape[0] // tall, tall, x.shape[1] // size, size)


def _ungrouped(request: Fp8QuantizeRequest, values: Tensor, shape: torch.Size) -> Tensor:
    width = values.shape[2] * values.shape[3]
    flat = values.view(torch.uint8).reshape(-1, width)[: shape[:-1].numel(), : shape[-1]]
    return flat.reshape(shape).view(values.dtype)


def _shaped(request: Fp8QuantizeRequest, groups: Tensor, scale: Tensor) -> Tensor:
    return scale.reshape(groups.shape[0], 1, groups.shape[2], 1)


def _copied(scales: Tensor, given: Tensor | None) -> Tensor:
    return scales if given is None else scales.clone()
