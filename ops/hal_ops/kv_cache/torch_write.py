"""The cache write by torch's indexing, all tokens at once. Any device; run on the CPU with torch 2.6.0 and 2.13.0.

What :func:`write` honours: any heads and dims; ``dtype`` float64, float32, bfloat16, float16; ``kv_dtype`` those and
the four FP8 formats; any page size; all layouts, caches of any strides (K and V as views of one tensor); scales a
tensor or a head; deterministic (for slots that differ); graph: nothing waits for the device or depends on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import FP8_DTYPES, is_fp8, torch_dtype
from hal_ops.kv_cache.op import KvCacheWriteRequest
from hal_ops.kv_layout import by_token
from hal_ops.skipping import repeating

__all__ = ["DTYPES", "KV_DTYPES", "write"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Formats of k and v."""
KV_DTYPES = (*DTYPES, *FP8_DTYPES)
"""Formats of the cache."""


def write(request: KvCacheWriteRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase.

    Raises:
        ValueError: a dtype that is not in ``DTYPES`` or ``KV_DTYPES``.
    """
    for name, allowed in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
        if getattr(request, name) not in allowed:
            raise ValueError(f"{name} {getattr(request, name)}: torch_write does {', '.join(allowed)}")
    size, layout = request.page_size, request.kv_layout
    convert = _converter(request.kv_dtype)

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
        if not slot_mapping.numel():
            return
        put = _put_kept if slot_mapping.is_cpu and not request.graph else _put_all
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            values = convert(x, scale)
            cache = by_token(cache.view(values.dtype), layout)
            put(values.view(-1, *cache.shape[2:]), cache, slot_mapping, size)

    return call


def _put_kept(values: Tensor, cache: Tensor, slots: Tensor, size: int) -> None:
    """Leaves the skipped tokens out, which takes a look at the slots. ``cache`` is seen tokens first."""
    if int(slots.min()) < 0:
        kept = slots >= 0
        values, slots = values[kept], slots[kept]
    cache[slots // size, slots % size] = values


def _put_all(values: Tensor, cache: Tensor, slots: Tensor, size: int) -> None:
    """The same without waiting for the device: each skipped token repeats one that is not skipped.

    Where all are skipped, one slot is given what it holds.
    """
    source, some = repeating(slots)
    slots = slots[source].clamp_min(0)
    place = (slots // size, slots % size)
    cache[place] = torch.where(some, values[source], cache[place])


def _converter(kv_dtype: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function that turns values into what the cache stores; FP8 as bytes, as torch 2.6.0 cannot index FP8."""
    dtype = torch_dtype(kv_dtype)
    if not is_fp8(kv_dtype):
        return lambda x, scale: x.to(dtype)
    most = torch.finfo(dtype).max

    def quantized(x: Tensor, scale: Tensor | None) -> Tensor:
        x = x.float() if scale is None else x.float() / scale.view(-1, 1)
        return x.clamp(-most, most).to(dtype).view(torch.uint8)

    return quantized
