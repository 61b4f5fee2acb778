"""What is wrong with the arguments of a quantisation to FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._call_inputs import mismatch, shown
from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import pair, read, spread, written
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest
from hal_ops.fp8_quantize.reference import Pair, scales_shape
from hal_ops.rows import unfolded

__all__ = ["check"]


def check(request: Fp8QuantizeRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    del values
    of_x, tall, static = read((request.hidden_size,), request.dtype, device), request.block_rows > 1, request.static
    fp8 = torch_dtype(request.fp8_dtype)

    def problem(x: Tensor, scale: Tensor | None = None, *, out: Pair | None = None) -> str:
        wrong = of_x("x", x)
        if wrong:
            return wrong
        if tall and x.dim() != 2:
            return f"x is {shown(x)}: blocks of several rows need [rows, {request.hidden_size}]"
        if static != (scale is not None):
            said = "missing" if scale is None else "given"
            return f"scale is {said}, and this was bound with static={static}: ask for static={not static}"
        if scale is None and out is None:
            return ""
        shape = scales_shape(request, tuple(x.shape))
        wrong = "" if scale is None else _scales("scale", scale, shape, device)
        if wrong or out is None:
            return wrong
        return (
            pair(out, "values and scales")
            or written("out[0]", out[0], x.shape, fp8, device)
            or _scales("out[1]", out[1], shape, device)
            or spread("out[1]", out[1])
        )

    return problem


def _scales(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> str:
    """Scales, which may have any strides that fold."""
    return mismatch(name, x, shape, torch.float32, device) or unfolded(name, x)
