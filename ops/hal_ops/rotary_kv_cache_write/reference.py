"""The oracle: the rotary embedding's, followed by the cache write's. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops.kv_cache.reference import write
from hal_ops.rotary_embedding.reference import rotary_embedding
from hal_ops.rotary_kv_cache_write.op import RotaryKvCacheWriteRequest
from hal_ops.rows import empty_like

__all__ = ["outputs", "rotary_kv_cache_write"]


def outputs(request: RotaryKvCacheWriteRequest) -> Callable[..., Tensor]:
    """Makes an empty output from the call's arguments."""
    del request

    def empty(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        return empty_like(q)

    return empty


def rotary_kv_cache_write(
    request: RotaryKvCacheWriteRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Tensor]:
    """The ``call`` phase. ``rounded=False`` leaves the turned q in the format of the sums; keys are rounded always."""
    turn = rotary_embedding(request.rotary(), device, accumulate=accumulate, rounded=rounded)
    put = write(request.write(), device)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        turned_q, turned_k = turn(q, k, cos, sin, positions)
        put(turned_k.to(k.dtype), v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return turned_q if out is None else out.copy_(turned_q)

    return call
