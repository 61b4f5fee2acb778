"""flashinfer's wrappers behind the attention contract: one factory a kernel of :mod:`hal_nvidia.flashinfer_kernels`.

The backend is always named: ``"auto"`` may become cuDNN or another one, by version and arch (0.7, ``decode.py``).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import hal
from hal_nvidia._flashinfer_paged import Paged, plan_arguments
from hal_nvidia._flashinfer_prefill import Prefill
from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest

__all__ = [
    "fa2_decode",
    "fa2_extend",
    "fa2_prefill",
    "fa3_extend",
    "fa3_prefill",
    "sink_decode",
    "sink_extend",
]

_TENSOR_CORES_FROM = 4
"""Query heads a kv head from which tensor cores decode faster (flashinfer's ``use_tensor_cores``)."""


def _uses_tensor_cores(request: AttentionRequest) -> bool:
    """Over FP8 caches always: the kernel without them has never run here with such a cache. It sums in float32 where keys
    and values of one byte were, which on sm_75 is too little room (flashinfer pull request 5038)."""
    return request.group_size >= _TENSOR_CORES_FROM or is_fp8(request.kv_dtype)


def fa2_prefill(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``BatchPrefillWithRaggedKVCacheWrapper`` with backend fa2."""
    return _prefill(request, device, "fa2")


def fa3_prefill(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``BatchPrefillWithRaggedKVCacheWrapper`` with backend fa3."""
    return _prefill(request, device, "fa3")


def fa2_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``BatchPrefillWithPagedKVCacheWrapper`` with backend fa2."""
    return _extend(request, device, "fa2")


def fa3_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``BatchPrefillWithPagedKVCacheWrapper`` with backend fa3."""
    return _extend(request, device, "fa3")


def fa2_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``BatchDecodeWithPagedKVCacheWrapper``; for several queries a row the prefill wrapper, which masks them."""
    if request.max_q_len > 1:
        return _extend(request, device, "fa2")
    make = functools.partial(
        _flashinfer().BatchDecodeWithPagedKVCacheWrapper,
        kv_layout=request.kv_layout,
        use_tensor_cores=_uses_tensor_cores(request),
        backend="fa2",
    )
    return Paged(request, device, make, plan_arguments(request), uniform=True)


def sink_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``BatchAttentionWithAttentionSinkWrapper``, on Hopper with backend fa3."""
    return _sink(request, device, "fa3" if device.arch.name == "sm_90" else "fa2")


def sink_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``BatchAttentionWithAttentionSinkWrapper`` with backend fa2, whose tiles suit few queries."""
    return _sink(request, device, "fa2")


def _flashinfer() -> Any:
    return importlib.import_module("flashinfer")


def _prefill(request: AttentionRequest, device: hal.Device, backend: str) -> Prefill:
    wrapper = _flashinfer().BatchPrefillWithRaggedKVCacheWrapper
    make = functools.partial(wrapper, kv_layout="NHD", backend=backend)
    arguments = {**plan_arguments(request), "kv_data_type": torch_dtype(request.dtype), "causal": request.causal}
    return Prefill(request, device, make, arguments)


def _extend(request: AttentionRequest, device: hal.Device, backend: str) -> Paged:
    wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper
    make = functools.partial(wrapper, kv_layout=request.kv_layout, backend=backend)
    return Paged(request, device, make, {**plan_arguments(request), "causal": request.causal}, uniform=False)


def _sink(request: AttentionRequest, device: hal.Device, backend: str) -> Paged:
    arguments = plan_arguments(request)
    make = functools.partial(
        _flashinfer().BatchAttentionWithAttentionSinkWrapper,
        kv_layout=request.kv_layout,
        backend=backend,
        q_data_type=arguments["q_data_type"],
        kv_data_type=arguments["kv_data_type"],
        head_dim_qk=request.head_dim,
        head_dim_vo=request.v_head_dim,
        window_left=arguments["window_left"],
    )
    return Paged(request, device, make, {**arguments, "causal": request.causal}, uniform=False)
