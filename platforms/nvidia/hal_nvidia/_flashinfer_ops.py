"""flashinfer's kernels for rows behind the contracts of the norms and the gated activations."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import FAR, LAST, aligned, parts_in_reach, readable
from hal_ops.fused_add_rms_norm import FusedAddRmsNormRequest
from hal_ops.gelu_and_mul import GeluAndMulRequest
from hal_ops.layer_norm import LayerNormRequest
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.silu_and_mul import SiluAndMulRequest

__all__ = ["fused_add_rms_norm", "gelu_and_mul", "layer_norm", "rms_norm", "silu_and_mul"]


def rms_norm(request: RmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``rmsnorm``, or ``gemma_rmsnorm`` where one is added to the weight."""
    norm = importlib.import_module("flashinfer.norm")
    if request.weight_offset:
        return _of_rows(norm.gemma_rmsnorm, request.eps)
    function, eps = norm.rmsnorm, request.eps

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None and x.dim() == 2:
            space = x.stride()[0]
            if 0 < x.shape[0] * space < FAR and not (x.data_ptr() | 2 * space | weight.data_ptr()) & LAST:
                found: Tensor = function(x, weight, eps)
                return found
        if not x.numel():
            return _empty(x, out)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, result in parts_in_reach(x, out):
            target = result if aligned(result) else result.new_empty(result.shape)
            rows, results = _alike(readable(part), target)
            function(rows, readable(weight), eps, out=results)
            if target is not result:
                result.copy_(target)
        return out

    return call


def _of_rows(function: Callable[..., Any], eps: float) -> Callable[..., Tensor]:
    """A norm that takes ``[rows, hidden]`` alone. What is no view of that shape is copied, as declared."""

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not x.numel():
            return _empty(x, out)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, result in parts_in_reach(x, out):
            shape = (math.prod(part.shape[:-1]), part.shape[-1])
            results = _seen(result, shape) if aligned(result) else None
            found: Tensor = function(readable(part.reshape(shape)), readable(weight), eps, out=results)
            if results is None:
                result.copy_(found.view(part.shape))
        return out

    return call


def fused_add_rms_norm(request: FusedAddRmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``fused_add_rmsnorm``, or ``gemma_fused_add_rmsnorm``: they put the result into x, so x is copied first."""
    norm = importlib.import_module("flashinfer.norm")
    function = norm.gemma_fused_add_rmsnorm if request.weight_offset else norm.fused_add_rmsnorm
    eps = request.eps

    def call(x: Tensor, residual: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is x and x.is_contiguous() and residual.is_contiguous() and x.dim() == 2:
            places = x.data_ptr() | residual.data_ptr() | weight.data_ptr()
            if 0 < x.numel() < FAR and not places & LAST:
                function(x, residual, weight, eps)
                return x
        if not x.numel():
            return _empty(x, out)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out is not x:
            out.copy_(x)
        for result, total in parts_in_reach(out, residual):
            added(result, total, weight)
        return out

    def added(result: Tensor, residual: Tensor, weight: Tensor) -> None:
        shape = (math.prod(result.shape[:-1]), result.shape[-1])
        rows, total = readable(result.reshape(shape)), readable(residual.reshape(shape))
        function(rows, total, readable(weight), eps)
        for made, given in ((rows, result), (total, residual)):
            if made.data_ptr() != given.data_ptr():
                given.copy_(made.view(given.shape))

    return call


def layer_norm(request: LayerNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``layernorm``."""
    function, eps = importlib.import_module("flashinfer.norm").layernorm, request.eps

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if weight is None or bias is None:
            raise ValueError("weight or bias is missing: this was bound with both")
        places = x.data_ptr() | weight.data_ptr() | bias.data_ptr()
        if out is None and x.dim() == 2 and x.is_contiguous() and 0 < x.numel() < FAR and not places & LAST:
            found: Tensor = function(x, weight, bias, eps)
            return found
        if not x.numel():
            return _empty(x, out)
        if out is None and x.numel() < FAR:
            found = function(_rows(x), readable(weight), readable(bias), eps)
            return found.view(x.shape)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        for part, result in parts_in_reach(x, out):
            result.copy_(function(_rows(part), readable(weight), readable(bias), eps).view(part.shape))
        return out

    return call


def _rows(x: Tensor) -> Tensor:
    """``[rows, hidden]`` one behind the other; a copy where x has gaps, or begins at another address."""
    return readable(x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1]))


def silu_and_mul(request: SiluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``silu_and_mul``."""
    return _gate(importlib.import_module("flashinfer.activation").silu_and_mul, request.hidden_size)


def gelu_and_mul(request: GeluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``gelu_and_mul``, which is the one with erf, or ``gelu_tanh_and_mul``."""
    module = importlib.import_module("flashinfer.activation")
    function = module.gelu_tanh_and_mul if request.approximate == "tanh" else module.gelu_and_mul
    return _gate(function, request.hidden_size)


def _gate(function: Callable[..., Any], hidden: int) -> Callable[..., Tensor]:
    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not x.numel():
            return _empty(x[..., :hidden], out)
        x = x.contiguous()  # read by its shape alone; declared in Kernel.copies
        if x.data_ptr() & LAST:
            x = x.clone()
        if out is None or not out.is_contiguous() or out.data_ptr() & LAST:
            made: Tensor = function(x)
            return made if out is None else out.copy_(made)
        function(x, out=out)
        return out

    return call


def _empty(x: Tensor, out: Tensor | None) -> Tensor:
    """What no rows give: there is nothing to launch."""
    return x.new_empty(x.shape) if out is None else out


def _alike(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both seen as ``[rows, hidden]`` or, where the rows of one are not evenly spaced, as ``[a, b, hidden]``."""
    sizes, hidden = x.shape[:-1], x.shape[-1]
    shapes: list[tuple[int, ...]] = [(math.prod(sizes), hidden)]
    shapes += [(math.prod(sizes[:i]), math.prod(sizes[i:]), hidden) for i in range(1, len(sizes))]
    for shape in shapes:
        seen = _seen(x, shape), _seen(out, shape)
        if seen[0] is not None and seen[1] is not None:
            return seen[0], seen[1]
    raise ValueError(f"x {tuple(x.stride())} or out {tuple(out.stride())}: leading dims must fold into two")


def _seen(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    try:
        return x.view(shape)
    except RuntimeError:
        return None
