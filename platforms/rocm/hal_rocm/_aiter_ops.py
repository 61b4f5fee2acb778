"""aiter's kernels for rows and cache writes behind the contracts of their ops; see :mod:`hal_rocm.aiter_op_kernels`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.fused_add_rms_norm import FusedAddRmsNormRequest
from hal_ops.gelu_and_mul import GeluAndMulRequest
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.layer_norm import LayerNormRequest
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.silu_and_mul import SiluAndMulRequest

__all__ = ["fused_add_rms_norm", "gelu_and_mul", "kv_cache_write", "layer_norm", "rms_norm", "silu_and_mul"]


def rms_norm(request: RmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``rmsnorm2d_fwd``."""
    function, eps = _module("rmsnorm").rmsnorm2d_fwd, request.eps

    def call(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        return _delivered(function(_rows(x), weight, eps), x, out) if x.numel() else _empty(x, out)

    return call


def fused_add_rms_norm(request: FusedAddRmsNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``rmsnorm2d_fwd_with_add``, by place: a version put an argument between the later ones."""
    function, eps = _module("rmsnorm").rmsnorm2d_fwd_with_add, request.eps

    def call(x: Tensor, residual: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not x.numel():
            return _empty(x, out)
        rows, before = _rows(x), _rows(residual)
        result, after = torch.empty_like(rows), torch.empty_like(before)
        function(result, rows, before, after, weight, eps)
        residual.copy_(after.view(residual.shape))
        return _delivered(result, x, out)

    return call


def layer_norm(request: LayerNormRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``layernorm2d_fwd``."""
    function, eps = _module("norm").layernorm2d_fwd, request.eps

    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if weight is None or bias is None:
            raise ValueError("weight or bias is missing: this was bound with both")
        return _delivered(function(_rows(x), weight, bias, eps), x, out) if x.numel() else _empty(x, out)

    return call


def silu_and_mul(request: SiluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``silu_and_mul``."""
    return _gate(_module("activation").silu_and_mul, request.hidden_size)


def gelu_and_mul(request: GeluAndMulRequest, device: hal.Device) -> Callable[..., Tensor]:
    """``gelu_and_mul``, which is the one with erf, or ``gelu_tanh_and_mul``."""
    module = _module("activation")
    function = module.gelu_tanh_and_mul if request.approximate == "tanh" else module.gelu_and_mul
    return _gate(function, request.hidden_size)


def kv_cache_write(request: KvCacheWriteRequest, device: hal.Device) -> Callable[..., None]:
    """``reshape_and_cache_flash``, or ``reshape_and_cache`` for keys in vectors."""
    flash = request.kv_layout == "NHD"
    function = _module("cache").reshape_and_cache_flash if flash else _module("cache").reshape_and_cache
    one = torch.ones(1, dtype=torch.float32, device=device.torch_device())
    check = _page_check(request) if flash else _check_whole

    def call(
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        check(k_cache, v_cache)
        if slot_mapping.numel():
            k, v = (x if x.stride(1) == request.head_dim else x.contiguous() for x in (k, v))
            function(k, v, k_cache, v_cache, slot_mapping, "auto", one, one)

    return call


def _page_check(request: KvCacheWriteRequest) -> Callable[[Tensor, Tensor], None]:
    page = (request.num_kv_heads * request.head_dim, request.head_dim, 1)

    def check(k_cache: Tensor, v_cache: Tensor) -> None:
        for name, cache in (("k", k_cache), ("v", v_cache)):
            if cache.stride()[1:] != page or cache.stride(0) != k_cache.stride(0):
                raise ValueError(
                    f"the {name} cache has strides {tuple(cache.stride())}, that of k {tuple(k_cache.stride())}: aiter "
                    f"writes pages of strides {page}, with one page stride for both; choose another write kernel"
                )

    return check


def _check_whole(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k", k_cache), ("v", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(
                f"the {name} cache has strides {tuple(cache.stride())}: aiter writes contiguous caches where keys lie "
                "in vectors; choose another write kernel"
            )


def _module(name: str) -> Any:
    return importlib.import_module(f"aiter.ops.{name}")


def _gate(function: Callable[..., Any], hidden: int) -> Callable[..., Tensor]:
    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        straight = out is not None and out.is_contiguous()
        result = out if straight and out is not None else x.new_empty((*x.shape[:-1], hidden))
        if x.numel():
            function(result, x.contiguous())
        return result if out is None or straight else out.copy_(result)

    return call


def _rows(x: Tensor) -> Tensor:
    """``[rows, hidden]``, contiguous; a copy where x is not, declared in ``Kernel.copies``."""
    return x.contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])


def _delivered(result: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    result = result.view(x.shape)
    return result if out is None else out.copy_(result)


def _empty(x: Tensor, out: Tensor | None) -> Tensor:
    """What no rows give: there is nothing to launch."""
    return x.new_empty(x.shape) if out is None else out
