"""What is wrong with the arguments of a cache write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._cache_inputs import CacheInputs
from hal_ops._call_inputs import mismatch, rows_apart
from hal_ops._dtypes import torch_dtype
from hal_ops.kv_cache.op import KvCacheWriteRequest

__all__ = ["check"]


def check(request: KvCacheWriteRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    about, dtype, heads = CacheInputs(request, device, values), torch_dtype(request.dtype), request.num_kv_heads

    def problem(
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> str:
        tokens = k.shape[0] if isinstance(k, Tensor) and k.dim() else 0
        return (
            mismatch("k", k, (tokens, heads, request.head_dim), dtype, device)
            or mismatch("v", v, (tokens, heads, request.v_head_dim), dtype, device)
            or rows_apart(k=k, v=v)
            or about.caches(k_cache, v_cache)
            or about.scales(k_scale, v_scale)
            or about.numbers("slot_mapping", slot_mapping, tokens, torch.int64)
            or about.below("slot_mapping", slot_mapping, k_cache.shape[0] * request.page_size, "slots")
        )

    return problem
