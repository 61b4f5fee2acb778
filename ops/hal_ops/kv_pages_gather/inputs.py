"""What is wrong with the arguments of a gather of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._cache_inputs import CacheInputs
from hal_ops._call_inputs import mismatch
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest

__all__ = ["check"]


def check(request: KvPagesGatherRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`. Kernels look at ``out`` themselves."""
    about = CacheInputs(request, device, values)

    def problem(
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        total: int,
        longest: int,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: object = None,
    ) -> str:
        del out
        size = tuple(block_table.shape) if isinstance(block_table, Tensor) and block_table.dim() == 2 else (0, 0)
        return (
            about.caches(k_cache, v_cache)
            or about.scales(k_scale, v_scale)
            or mismatch("block_table", block_table, size, torch.int32, device)
            or ("" if block_table.stride(1) == 1 or size[1] < 2 else "block_table's last dim is not contiguous")
            or about.numbers("cu_seqlens", cu_seqlens, size[0] + 1, torch.int32)
            or (_rows(block_table, cu_seqlens, total, longest, request.page_size) if about.reads else "")
            or (_pages(block_table, cu_seqlens, k_cache.shape[0], request.page_size) if about.reads else "")
        )

    return problem


def _rows(table: Tensor, cu_seqlens: Tensor, total: int, longest: int, page_size: int) -> str:
    """Lengths that go with the numbers on the host, and with the table."""
    lengths = cu_seqlens.diff()
    first, last, most = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(lengths.max()) if len(lengths) else 0
    if first != 0 or (len(lengths) and int(lengths.min()) < 0):
        return "cu_seqlens must start at 0 and never fall"
    if last != total or most > longest:
        return f"cu_seqlens ends at {last}, total is {total}; its longest row has {most} tokens, longest is {longest}"
    if most > table.shape[1] * page_size:
        return (
            f"block_table has {table.shape[1]} pages a row, and the longest row {most} tokens (page_size {page_size})"
        )
    return ""


def _pages(table: Tensor, cu_seqlens: Tensor, pages: int, page_size: int) -> str:
    """Pages that rows use are in the cache; others may be anything."""
    begins = torch.arange(table.shape[1], device=table.device) * page_size
    wrong = ((table < 0) | (table >= pages)) & (begins < cu_seqlens.diff().unsqueeze(1))
    if not wrong.any():
        return ""
    row, column = wrong.nonzero()[0].tolist()
    return f"block_table[{row}][{column}] is page {int(table[row, column])}, and the cache has {pages}"
