"""What is wrong with the arguments of a rotary embedding with its cache write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._cache_inputs import CacheInputs
from hal_ops._call_inputs import mismatch, rows_apart
from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import written
from hal_ops.rotary_embedding.inputs import tables
from hal_ops.rotary_kv_cache_write.op import RotaryKvCacheWriteRequest

__all__ = ["check"]


def check(request: RotaryKvCacheWriteRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    about, of_tables = CacheInputs(request, device, values), tables(request, device)
    dtype, q_heads, kv_heads = torch_dtype(request.dtype), request.num_q_heads, request.num_kv_heads

    def problem(
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
    ) -> str:
        tokens = q.shape[0] if isinstance(q, Tensor) and q.dim() else 0
        q_shape = (tokens, q_heads, request.head_dim)
        return (
            mismatch("q", q, q_shape, dtype, device)
            or mismatch("k", k, (tokens, kv_heads, request.head_dim), dtype, device)
            or mismatch("v", v, (tokens, kv_heads, request.v_head_dim), dtype, device)
            or ("" if out is None else written("out", out, q_shape, dtype, device, kept=2))
            or rows_apart(q=q, k=k, v=v)
            or of_tables(cos, sin)
            or about.numbers("positions", positions, tokens, torch.int32, torch.int64)
            or about.caches(k_cache, v_cache)
            or about.scales(k_scale, v_scale)
            or about.numbers("slot_mapping", slot_mapping, tokens, torch.int64)
            or about.below("slot_mapping", slot_mapping, k_cache.shape[0] * request.page_size, "slots")
        )

    return problem
