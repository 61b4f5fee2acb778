"""Shared memory of the Hopper kernels, and the warps that fill it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: PIE808, RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from hal_ops.attention._triton_place import key_blocks

__all__ = ["pair_of_barriers", "pair_of_buffers", "produce", "rows_layout"]

# Triton 3.9 calls both async_load.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.constexpr_function
def rows_layout(columns, warps, dtype):
    """Threads along the columns, 16 bytes each; rows across warps."""
    width = 128 // dtype.primitive_bitwidth
    threads = min(columns // width, 32)
    return gl.BlockedLayout([1, width], [32 // threads, threads], [warps, 1], [1, 0])


@gluon.constexpr_function
def _rows_at_once(columns, rows, dtype):
    """Rows that one instruction of a warpgroup copies, at least 16."""
    return min(rows, max(16, 128 // min(columns * dtype.primitive_bitwidth // 128, 32)))


@gluon.jit
def _buffers(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, COLUMNS], LAYOUT)


@gluon.jit
def pair_of_buffers(
    dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr
):
    """For the first ``CUT`` columns and for the rest; where there is none, the first once more."""
    whole = _buffers(dtype, COUNT, ROWS, CUT)
    rest = whole
    if REST > 0:
        rest = _buffers(dtype, COUNT, ROWS, REST)
    return whole, rest


@gluon.jit
def pair_of_barriers(COUNT: gl.constexpr):
    pair = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(pair.index(0), count=COUNT)
    mbarrier.init(pair.index(1), count=COUNT)
    return pair


@gluon.jit
def _copy_part(buffer, source, start, low, high, DIM: gl.constexpr, FIRST: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Columns from ``FIRST`` on of the keys from ``start`` on; 0, and no access, for keys outside ``[low, high)``."""
    base, table, page_stride, stride = source
    BLOCK_N: gl.constexpr = buffer.shape[0]
    BLOCK: gl.constexpr = buffer.shape[1]
    ROWS: gl.constexpr = _rows_at_once(BLOCK, BLOCK_N, buffer.dtype)
    LAYOUT: gl.constexpr = rows_layout(BLOCK, 4, buffer.dtype)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = FIRST + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    for part in gl.static_range(BLOCK_N // ROWS):
        first = start + part * ROWS
        used = (rows >= low - first) & (rows < high - first)
        if PAGE_SIZE == 0:
            place = base + first.to(gl.int64) * stride
            pointers = place + (rows[:, None] * stride + columns[None, :])
        elif PAGE_SIZE % ROWS == 0:
            page = gl.load(table + first // PAGE_SIZE, mask=(first < high) & (first + ROWS > low), other=0)
            place = base + (page.to(gl.int64) * page_stride + first % PAGE_SIZE * stride)
            pointers = place + (rows[:, None] * stride + columns[None, :])
        else:
            pages = gl.load(table + (first + rows) // PAGE_SIZE, mask=used, other=0)
            slots = pages.to(gl.int64) * page_stride + (first + rows) % PAGE_SIZE * stride
            pointers = base + (slots[:, None] + columns[None, :])
        inside = used[:, None]
        if FIRST + BLOCK > DIM:
            inside = inside & (columns < DIM)[None, :]
        _copy(buffer.slice(part * ROWS, ROWS), pointers, mask=inside)


@gluon.jit
def _copy_block(
    buffers, slot, source, start, low, high,
    DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Starts the copy of a block of keys, or of values, to the buffers of a slot."""
    whole, rest = buffers
    _copy_part(whole.index(slot), source, start, low, high, DIM, 0, PAGE_SIZE)
    if whole.shape[2] < DIM:
        _copy_part(rest.index(slot), source, start, low, high, DIM, whole.shape[2], PAGE_SIZE)


@gluon.jit
def _fill(
    buffers, slot, full, source, boxes, start, low, high, DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr
):
    """Copies a block to the buffers of a slot; ``full`` is told when it is there.

    With ``TMA`` the copy engine takes the blocks that lie in ``[low, high)`` wholly; it cannot leave out single keys.
    """
    whole, rest = buffers
    ready = full.index(slot)
    BLOCK_N: gl.constexpr = whole.shape[1]
    if TMA:
        if (start >= low) & (start + BLOCK_N <= high):
            box, box_rest, row, column, page_rows = boxes
            row += start
            if PAGE_SIZE > 0:
                page = gl.load(source[1] + start // PAGE_SIZE)
                row += page * page_rows - start // PAGE_SIZE * PAGE_SIZE
            mbarrier.expect(ready, BLOCK_N * DIM * (whole.dtype.primitive_bitwidth // 8))
            _copy_box(box, [row, column], ready, whole.index(slot))
            if whole.shape[2] < DIM:
                _copy_box(box_rest, [row, column + whole.shape[2]], ready, rest.index(slot))
        else:
            _copy_block(buffers, slot, source, start, low, high, DIM, PAGE_SIZE)
            async_copy.commit_group()
            async_copy.wait_group(0)
            hopper.fence_async_shared()
            mbarrier.arrive(ready)
    else:
        _copy_block(buffers, slot, source, start, low, high, DIM, PAGE_SIZE)
        async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _widen(raw, values, slot):
    """Converts values of FP8 to those that are multiplied, a few rows at a time."""
    BLOCK_N: gl.constexpr = raw.shape[1]
    ROWS: gl.constexpr = min(BLOCK_N, 4096 // raw.shape[2])
    LAYOUT: gl.constexpr = rows_layout(raw.shape[2], 4, raw.dtype)
    source, target = raw.index(slot), values.index(slot)
    for part in gl.static_range(BLOCK_N // ROWS):
        x = source.slice(part * ROWS, ROWS).load(LAYOUT)
        target.slice(part * ROWS, ROWS).store(x.to(values.dtype))


@gluon.jit
def produce(
    copy, TOKENS: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Copies the blocks' keys and values, each as soon as all consumers have done with what its buffer held."""
    k_source, v_source, k_boxes, v_boxes, token, q_len, kv_len, left, right, keys, values, barriers, raw, raw_full = (
        copy
    )
    FP8: gl.constexpr = raw[0].dtype != values[0].dtype
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    k_full, k_empty, v_full, v_empty = barriers
    shift = kv_len - q_len
    low, high, begin, whole, ragged, end = key_blocks(
        token + shift, gl.minimum(token + TOKENS, q_len) - 1 + shift, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    start = gl.maximum(end - 1, begin) * BLOCK_N
    count = gl.maximum(end - begin, 1)
    _fill(keys, 0, k_full, k_source, k_boxes, start, low, high, DIM, PAGE_SIZE, TMA)
    if FP8:
        _fill(raw, 0, raw_full, v_source, v_boxes, start, low, high, V_DIM, PAGE_SIZE, TMA)
    for j in range(0, count):
        if j + 1 < count:
            after = j + 1
            first = start - after * BLOCK_N
            mbarrier.wait(k_empty.index(after & 1), ((after >> 1) & 1) ^ 1)
            _fill(keys, after & 1, k_full, k_source, k_boxes, first, low, high, DIM, PAGE_SIZE, TMA)
            if FP8:
                _fill(raw, after & 1, raw_full, v_source, v_boxes, first, low, high, V_DIM, PAGE_SIZE, TMA)
        mbarrier.wait(v_empty.index(j & 1), ((j >> 1) & 1) ^ 1)
        if FP8:
            mbarrier.wait(raw_full.index(j & 1), (j >> 1) & 1)
            _widen(raw[0], values[0], j & 1)
            hopper.fence_async_shared()
            mbarrier.arrive(v_full.index(j & 1))
        else:
            _fill(values, j & 1, v_full, v_source, v_boxes, start - j * BLOCK_N, low, high, V_DIM, PAGE_SIZE, TMA)
