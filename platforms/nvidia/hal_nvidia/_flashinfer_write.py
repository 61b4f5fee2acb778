"""flashinfer's cache write behind the contract of ``kv_cache_write``.

``append_paged_kv_cache`` finds a token's place by its request and its position in that. Here all pages are those of one
request, in order, so that a position is a slot. It can skip no token: each that is skipped repeats one that is not, and
where all are, one slot is given what it holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import LAST, aligned
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.skipping import repeating

__all__ = ["kv_cache_write"]

_FAR_STRIDE = 1 << 32
"""``page.cuh`` keeps strides in uint32."""


def kv_cache_write(request: KvCacheWriteRequest, device: hal.Device) -> Callable[..., None]:
    """``append_paged_kv_cache``.

    Raises:
        ValueError: of the call, for caches of different strides, of strides from 2**32 on, or whose heads do not begin at
            multiples of 16 bytes.
    """
    function, layout = importlib.import_module("flashinfer.page").append_paged_kv_cache, request.kv_layout
    seen: tuple[int, ...] = ()
    size, heads = (request.num_kv_heads, request.head_dim), 2 if layout == "NHD" else 1

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
        nonlocal seen
        strides, places = k_cache.stride(), k_cache.data_ptr() | v_cache.data_ptr()
        if strides != seen or strides != v_cache.stride() or places & LAST:
            _check(k_cache, v_cache)
            seen = strides
        count = slot_mapping.shape[0]
        if not count:
            return
        source, some = repeating(slot_mapping)
        slot = strides[heads], 1  # the first one's, as a view: of all ways to one as_strided costs least
        keys = torch.where(some, k.index_select(0, source), k_cache.as_strided(size, slot))
        values = torch.where(some, v.index_select(0, source), v_cache.as_strided(size, slot))
        slots = slot_mapping.index_select(0, source).clamp_min_(0).int()
        zeros = slots.new_zeros(max(count, 2))
        requests = zeros if count > 1 else zeros[:1]
        pages = torch.arange(k_cache.shape[0], dtype=torch.int32, device=k.device)
        function(keys, values, requests, slots, (k_cache, v_cache), pages, zeros[:2], zeros[:1], layout)

    return call


def _check(k_cache: Tensor, v_cache: Tensor) -> None:
    strides = k_cache.stride()
    if strides != v_cache.stride() or max(strides) >= _FAR_STRIDE or not (aligned(k_cache) and aligned(v_cache)):
        raise ValueError(
            f"the caches have strides {tuple(k_cache.stride())} and {tuple(v_cache.stride())}: flashinfer writes two of "
            "the same strides, below 2**32 and multiples of 16 bytes, as are their addresses; choose another write kernel"
        )
