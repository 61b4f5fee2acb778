"""The gather of rows out of a paged cache by torch's indexing. Any device.

What :func:`kv_pages_gather` honours: ``dtype`` and a cache in float64, float32, bfloat16, float16, and a cache in the
four FP8 formats, with scales a tensor or a head; any heads, dims and page size; both layouts, caches of any strides;
deterministic; graph: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest
from hal_ops.kv_pages_gather.reference import Pair

__all__ = ["kv_pages_gather"]


def kv_pages_gather(request: KvPagesGatherRequest, device: object) -> Callable[..., Pair]:
    """The ``call`` phase."""
    size, heads_first, fp8 = request.page_size, request.kv_layout == "HND", is_fp8(request.kv_dtype)
    dtype = torch_dtype(request.dtype)

    def gathered(cache: Tensor, place: tuple[Tensor, Tensor], scale: Tensor | None) -> Tensor:
        bits = cache.view(torch.uint8) if fp8 else cache  # torch 2.6.0 cannot index FP8
        found = (bits.transpose(1, 2) if heads_first else bits)[place].view(cache.dtype)
        return found.to(dtype) if scale is None else (found.float() * scale.view(-1, 1)).to(dtype)

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
        token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
        row = torch.searchsorted(cu_seqlens, token, right=True) - 1
        position = token - cu_seqlens[row]
        place = block_table[row, position // size].long(), (position % size).long()
        k, v = gathered(k_cache, place, k_scale), gathered(v_cache, place, v_scale)
        return (k, v) if out is None else (out[0].copy_(k), out[1].copy_(v))

    return call
