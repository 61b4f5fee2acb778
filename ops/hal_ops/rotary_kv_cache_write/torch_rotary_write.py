"""The rotary embedding and the cache write by torch's operators, one after the other. Any device.

What :func:`rotary_kv_cache_write` honours: what :mod:`hal_ops.rotary_embedding.torch_rotary` and
:mod:`hal_ops.kv_cache.torch_write` do: ``dtype`` float64, float32, bfloat16, float16; a cache in any of these or in one
of the four FP8 formats; any heads, dims and page size; both styles and layouts; deterministic (for slots that differ);
graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import deliver
from hal_ops.kv_cache.torch_write import write
from hal_ops.rotary_embedding.torch_rotary import rotary_embedding
from hal_ops.rotary_kv_cache_write.op import RotaryKvCacheWriteRequest

__all__ = ["rotary_kv_cache_write"]


def rotary_kv_cache_write(request: RotaryKvCacheWriteRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase.

    Raises:
        ValueError: a format that :mod:`hal_ops.kv_cache.torch_write` does not do.
    """
    turn, put = rotary_embedding(request.rotary(), device), write(request.write(), device)
    dtype = torch_dtype(request.dtype)

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
        put(turned_k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return turned_q if out is None else deliver(turned_q, dtype, out)

    return call
