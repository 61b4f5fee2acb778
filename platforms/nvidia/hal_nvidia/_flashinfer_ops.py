"""flashinfer's kernels for rows behind the contracts of ``rms_norm``, ``silu_and_mul`` and ``gelu_and_mul``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.gelu_and_mul import GeluAndMulRequest
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.silu_and_mul import SiluAndMulRequest

__all__ = ["gelu_and_mul", "rms_norm", "silu_and_mul"]


def rms_norm(request: RmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``rmsnorm``, or ``gemma_rmsnorm`` where one is added to the weight."""
    norm = importlib.import_module("flashinfer.norm")
    if request.weight_offset:
        return _of_rows(norm.gemma_rmsnorm, request.eps)
    function, eps = norm.rmsnorm, request.eps

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            if x.dim() == 2:
                found: Tensor = function(x, weight, eps)
                return found
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, results = _alike(x, out)
        function(rows, weight, eps, out=results)
        return out

    return call


def _of_rows(function: Callable[..., Any], eps: float) -> Callable[..., Tensor]:
    """A norm that takes ``[rows, hidden]`` alone. What is no view of that shape is copied, as declared."""

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        shape = (math.prod(x.shape[:-1]), x.shape[-1])
        results = None if out is None else _seen(out, shape)
        found: Tensor = function(x.reshape(shape), weight, eps, out=results)
        if out is None:
            return found.view(x.shape)
        return out if results is not None else out.copy_(found.view(x.shape))

    return call


def silu_and_mul(request: SiluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``silu_and_mul``."""
    return _gate(importlib.import_module("flashinfer.activation").silu_and_mul)


def gelu_and_mul(request: GeluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``gelu_and_mul``, which is the one with erf, or ``gelu_tanh_and_mul``."""
    module = importlib.import_module("flashinfer.activation")
    function = module.gelu_tanh_and_mul if request.approximate == "tanh" else module.gelu_and_mul
    return _gate(function)


def _gate(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        x = x.contiguous()  # read by its shape alone; declared in Kernel.copies
        if out is None or not out.is_contiguous():
            made: Tensor = function(x)
            return made if out is None else out.copy_(made)
        function(x, out=out)
        return out

    return call


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
