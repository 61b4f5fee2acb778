"""The oracle of the gather: row by row, token by token. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import wide_format
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest

__all__ = ["Pair", "kv_pages_gather", "outputs"]

Pair = tuple[Tensor, Tensor]


def outputs(request: KvPagesGatherRequest) -> Callable[..., Pair]:
    """Makes empty outputs from the call's arguments."""
    dtype, heads = torch_dtype(request.dtype), request.num_kv_heads

    def empty(
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        total: int,
        longest: int,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Pair:
        k = k_cache.new_empty((total, heads, request.head_dim), dtype=dtype)
        return k, v_cache.new_empty((total, heads, request.v_head_dim), dtype=dtype)

    return empty


def kv_pages_gather(
    request: KvPagesGatherRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Pair]:
    """The ``call`` phase. ``rounded=False`` leaves the results in the format of the products."""
    wide, dtype = wide_format(request.kv_dtype, accumulate), torch_dtype(request.dtype)
    size, heads_first = request.page_size, request.kv_layout == "HND"

    def gathered(cache: Tensor, table: Tensor, cu_seqlens: Tensor, scale: Tensor | None) -> Tensor:
        heads, dim = request.num_kv_heads, cache.shape[-1]
        tokens = [torch.zeros(0, heads, dim, dtype=wide, device=cache.device)]
        for row, length in enumerate(cu_seqlens.diff().tolist()):
            for position in range(length):
                page = int(table[row, position // size])
                at = position % size
                token = (cache[page, :, at] if heads_first else cache[page, at]).to(wide)
                tokens.append((token if scale is None else token * scale.to(wide).view(-1, 1))[None])
        found = torch.cat(tokens)
        return found.to(dtype) if rounded else found

    def call(
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        total: int,
        longest: int,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Pair | None = None,
    ) -> Pair:
        k, v = (gathered(x, block_table, cu_seqlens, s) for x, s in ((k_cache, k_scale), (v_cache, v_scale)))
        return (k, v) if out is None else (out[0].copy_(k), out[1].copy_(v))

    return call
