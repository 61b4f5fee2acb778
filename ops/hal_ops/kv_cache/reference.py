"""The oracle of the cache write: token by token, by the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.kv_cache.op import KvCacheWriteRequest
from hal_ops.kv_layout import by_token

__all__ = ["quantize", "write"]


def quantize(x: Tensor, scale: Tensor | None, kv_dtype: str) -> Tensor:
    """x ``[..., num_kv_heads, dim]`` as an FP8 cache stores it: divided by the scale, clamped, rounded.

    The clamp is needed: torch's cast to ``float8_e4m3fn`` turns what is too large into NaN up to 2.6.0 and into the
    largest value in 2.13.0, its cast to ``float8_e4m3fnuz`` into NaN in both.
    """
    dtype = torch_dtype(kv_dtype)
    if not is_fp8(kv_dtype):
        return x.to(dtype)
    x = x.float() if scale is None else x.float() / scale.float().view(-1, 1)
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def write(request: KvCacheWriteRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase."""

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
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            page, offset = divmod(slot, request.page_size)
            for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
                place = by_token(cache, request.kv_layout)[page, offset]
                place.copy_(quantize(x[token], scale, request.kv_dtype).view(place.shape))

    return call
