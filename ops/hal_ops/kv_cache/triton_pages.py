"""Pages of a paged cache, copied (to fork a sequence) and gathered (to hand a sequence's keys and values on).

Both take caches of either layout and of any strides with a contiguous last dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["copy_kernel", "copy_pages", "gather", "gather_kernel"]

_BLOCK = 4096
_GATHERED = 2048
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize_on_alignment=["source", "target"])
def copy_kernel(
    cache, source, target, page_stride, outer_stride, inner_stride,
    OUTER: tl.constexpr, INNER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: ``(pages * BLOCKS,)``. A page is ``[OUTER, INNER, DIM]``."""
    program = tl.program_id(0)
    pair = program // BLOCKS
    at = tl.load(source + pair).to(tl.int64)
    to = tl.load(target + pair).to(tl.int64)
    if (at < 0) | (to < 0):
        return
    e = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    offsets = e // (INNER * DIM) * outer_stride + e // DIM % INNER * inner_stride + e % DIM
    mask = e < OUTER * INNER * DIM
    values = tl.load(cache + at * page_stride + offsets, mask=mask)
    tl.store(cache + to * page_stride + offsets, values, mask=mask)


def copy_pages(caches: tuple[Tensor, ...], source: Tensor, target: Tensor) -> None:
    """Copy page ``source[i]`` of each cache to page ``target[i]``, in place.

    Args:
        caches: K and V, of one layer or of several: ``[num_pages, ...]`` of four dims, in any format.
        source, target: int32 or int64 ``[pages]``; a pair with a negative page is skipped. A page may be read many
            times; one that is written may not be read or written by another pair.

    Raises:
        ValueError: source and target have different lengths.
    """
    if source.shape != target.shape:
        raise ValueError(f"source has {source.shape[0]} pages, target {target.shape[0]}: they are pairs")
    if not len(source):
        return
    for cache in caches:
        outer, inner, dim = cache.shape[1:]
        blocks = -(-outer * inner * dim // _BLOCK)
        bits = cache.view(_BITS[cache.itemsize])
        copy_kernel[(len(source) * blocks,)](
            bits, source, target, *bits.stride()[:3], OUTER=outer, INNER=inner, DIM=dim, BLOCK=_BLOCK, BLOCKS=blocks,
            num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table", "scale"])
def gather_kernel(
    cache, out, table, lengths, scale, table_stride, page_stride, slot_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: ``(rows, token blocks * BLOCKS)``; ``lengths`` are cumulative."""
    row = tl.program_id(0)
    begin = tl.load(lengths + row)
    length = tl.load(lengths + row + 1) - begin
    program = tl.program_id(1)
    token = program // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    if program // BLOCKS * BLOCK_T >= length:
        return
    inside = token < length
    page = tl.load(table + row.to(tl.int64) * table_stride + token // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (c < HEADS * DIM)[None, :]
    place = page * page_stride + token % PAGE_SIZE * slot_stride
    values = tl.load(cache + place[:, None] + (c // DIM * head_stride + c % DIM)[None, :], mask=mask, other=0.0)
    if SCALES > 0:
        by = tl.load(scale + c // DIM * (SCALES - 1), mask=c < HEADS * DIM, other=0.0)
        values = values.to(tl.float32) * by[None, :]
    out += begin.to(tl.int64) * (HEADS * DIM)
    tl.store(out + token[:, None] * (HEADS * DIM) + c[None, :], values.to(out.dtype.element_ty), mask=mask)


def gather(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    *,
    total: int,
    longest: int,
    kv_layout: str = "NHD",
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The keys (or values) of each row, one row behind the other, contiguous.

    Args:
        cache: ``[num_pages, page_size, num_kv_heads, dim]`` (NHD), or with the middle dims swapped (HND).
        block_table: int32 ``[rows, max_pages]``; entries past a row's last page may hold anything.
        cu_seqlens: int32 ``[rows + 1]`` on the device, in tokens, from 0 to the sum.
        total: that sum. longest: tokens of the longest row; both host numbers, so nothing waits for the device.
        scale: float32, one element or one a head; values are multiplied by it.
        dtype: of the result (default: the cache's).

    Returns:
        ``[total, num_kv_heads, dim]`` in ``dtype``.

    Raises:
        ValueError: an unknown layout.
    """
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"kv_layout={kv_layout!r}: choose 'NHD' or 'HND'")
    slot, head = (1, 2) if kv_layout == "NHD" else (2, 1)
    heads, dim = cache.shape[head], cache.shape[3]
    out = torch.empty((total, heads, dim), dtype=dtype or cache.dtype, device=cache.device)
    block_c = min(1024, triton.next_power_of_2(heads * dim))
    block_t, blocks = max(1, _GATHERED // block_c), -(-heads * dim // block_c)
    if not total:
        return out
    gather_kernel[(len(block_table), -(-longest // block_t) * blocks)](
        cache, out, block_table, cu_seqlens, cu_seqlens if scale is None else scale, block_table.stride(0),
        cache.stride(0), cache.stride(slot), cache.stride(head),
        HEADS=heads, DIM=dim, PAGE_SIZE=cache.shape[slot],
        SCALES=0 if scale is None else (2 if scale.numel() > 1 else 1),
        BLOCK_T=block_t, BLOCK_C=block_c, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return out
