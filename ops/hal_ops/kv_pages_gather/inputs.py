"""What is wrong with the arguments of a gather of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._cache_inputs import CacheInputs
from hal_ops._call_inputs import gaps, mismatch, rows_apart, shown
from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import pair
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest

__all__ = ["check"]


def check(request: KvPagesGatherRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    about, dtype, heads = CacheInputs(request, device, values), torch_dtype(request.dtype), request.num_kv_heads
    dims = request.head_dim, request.v_head_dim

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
        out: tuple[Tensor, Tensor] | None = None,
    ) -> str:
        return (
            about.caches(k_cache, v_cache)
            or about.scales(k_scale, v_scale)
            or _table(block_table, device)
            or about.numbers("cu_seqlens", cu_seqlens, block_table.shape[0] + 1, torch.int32)
            or ("" if out is None else _outs(out, (total, heads), dims, dtype, device))
            or (_rows(block_table, cu_seqlens, total, longest, request.page_size) if about.reads else "")
            or (_pages(block_table, cu_seqlens, k_cache.shape[0], request.page_size) if about.reads else "")
        )

    return problem


def _table(table: Tensor, device: torch.device) -> str:
    if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.int32 or table.device != device:
        return f"block_table is {shown(table)}, and should be int32 [rows, max_pages] on {device}"
    return rows_apart(block_table=table)


def _outs(
    out: tuple[Tensor, Tensor], lead: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str:
    """A contiguous pair."""
    wrong = pair(out, "k and v")
    for name, x, dim in () if wrong else (("out[0]", out[0], dims[0]), ("out[1]", out[1], dims[1])):
        wrong = wrong or mismatch(name, x, (*lead, dim), dtype, device) or gaps(name, x)
    return wrong


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
