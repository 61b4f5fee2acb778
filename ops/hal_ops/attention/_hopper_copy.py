"""Shared memory of the Hopper kernels, and the warps that fill it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from hal_ops.attention._hopper_tiles import tile_of
from hal_ops.attention._triton_place import key_blocks

__all__ = ["barriers_of", "pair_of_buffers", "produce", "rows_layout"]

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
def barriers_of(ARRIVALS: gl.constexpr, COUNT: gl.constexpr):
    """``COUNT`` barriers that complete when so many have arrived."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


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
def _copy_boxes(buffers, slot, ready, source, boxes, start, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr):
    """The copy engine takes a block as it is, whoever sees its keys; ``ready`` is told when it is there."""
    whole, rest = buffers
    box, box_rest, row, column, page_rows = boxes
    BLOCK_N: gl.constexpr = whole.shape[1]
    row += start
    if PAGE_SIZE > 0:
        page = gl.load(source[1] + start // PAGE_SIZE)
        row += page * page_rows - start // PAGE_SIZE * PAGE_SIZE
    mbarrier.expect(ready, BLOCK_N * DIM * (whole.dtype.primitive_bitwidth // 8))
    _copy_box(box, [row, column], ready, whole.index(slot))
    if whole.shape[2] < DIM:
        _copy_box(box_rest, [row, column + whole.shape[2]], ready, rest.index(slot))


@gluon.jit
def _convert(source, target, low, high, CLEAN: gl.constexpr):
    """A block in the format of ``target``, a few rows at a time; with ``CLEAN`` 0 for rows outside ``[low, high)``."""
    BLOCK_N: gl.constexpr = source.shape[0]
    COLUMNS: gl.constexpr = source.shape[1]
    ROWS: gl.constexpr = min(BLOCK_N, 4096 // COLUMNS)
    LAYOUT: gl.constexpr = rows_layout(COLUMNS, 4, source.dtype)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    for part in gl.static_range(BLOCK_N // ROWS):
        x = source.slice(part * ROWS, ROWS).load(LAYOUT).to(target.dtype)
        if CLEAN:
            inside = (rows >= low - part * ROWS) & (rows < high - part * ROWS)
            x = gl.where(inside[:, None], x, 0.0)
        target.slice(part * ROWS, ROWS).store(x)


@gluon.jit
def _fetch(n, side, source, boxes, start, low, high, DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr):
    """Starts the copy of the kernel's block ``n``, if it is of FP8 and to be converted: where to, nobody else reads."""
    buffers, raw, raw_full, full, empty = side
    if raw[0].dtype != buffers[0].dtype:
        if TMA:
            if start < high:
                _copy_boxes(raw, 0, raw_full.index(0), source, boxes, start, PAGE_SIZE, DIM)
            else:
                mbarrier.arrive(raw_full.index(0))
        else:
            _copy_block(raw, 0, source, start, low, high, DIM, PAGE_SIZE)
            async_copy.mbarrier_arrive(raw_full.index(0), increment_count=False)


@gluon.jit
def _supply(
    n, cleaned, side, source, boxes, start, low, high,
    DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr, CLEAN: gl.constexpr,
):  # fmt: skip
    """Gives the consumers the kernel's block ``n``, as soon as all have done with what its buffer held.

    Keys that no query of the tile sees are masked, whatever they are. Values outside ``[low, high)`` have to be 0, since
    0 times what might be there need not be: with ``CLEAN`` those that the copy engine took along are. Returns how many
    blocks were.
    """
    buffers, raw, raw_full, full, empty = side
    BLOCK_N: gl.constexpr = buffers[0].shape[1]
    whole = (start >= low) & (start + BLOCK_N <= high)
    ready = full.index(n & 1)
    mbarrier.wait(empty.index(n & 1), ((n >> 1) & 1) ^ 1)
    if raw[0].dtype != buffers[0].dtype:
        mbarrier.wait(raw_full.index(0), n & 1)
        if TMA and CLEAN:
            if whole:
                _convert(raw[0].index(0), buffers[0].index(n & 1), 0, 0, False)
            else:
                _convert(raw[0].index(0), buffers[0].index(n & 1), low - start, high - start, True)
        else:
            _convert(raw[0].index(0), buffers[0].index(n & 1), 0, 0, False)
        hopper.fence_async_shared()
        mbarrier.arrive(ready)
    elif not TMA:
        _copy_block(buffers, n & 1, source, start, low, high, DIM, PAGE_SIZE)
        async_copy.mbarrier_arrive(ready, increment_count=False)
    elif not CLEAN:
        if start < high:
            _copy_boxes(buffers, n & 1, ready, source, boxes, start, PAGE_SIZE, DIM)
        else:
            mbarrier.arrive(ready)
    else:
        if whole:
            _copy_boxes(buffers, n & 1, ready, source, boxes, start, PAGE_SIZE, DIM)
        else:
            if start < high:
                _copy_boxes(buffers, n & 1, raw_full.index(0), source, boxes, start, PAGE_SIZE, DIM)
            else:
                mbarrier.arrive(raw_full.index(0))
            mbarrier.wait(raw_full.index(0), cleaned & 1)
            cleaned += 1
            first, rest = buffers
            _convert(first.index(n & 1), first.index(n & 1), low - start, high - start, True)
            if first.shape[2] < DIM:
                _convert(rest.index(n & 1), rest.index(n & 1), low - start, high - start, True)
            hopper.fence_async_shared()
            mbarrier.arrive(ready)
    return cleaned


@gluon.jit
def _source(side, row, kv_head, k_start, table, PAGE_SIZE: gl.constexpr, UNIT: gl.constexpr):
    """Where the keys, or values, of a tile are: for copies of rows, and for the copy engine."""
    base, box, box_rest, outer_rows, head_rows, head_columns, outer, stride, head_stride = side
    base += kv_head.to(gl.int64) * head_stride
    first = kv_head * head_rows
    page_rows = outer_rows
    if PAGE_SIZE == 0:
        base += row.to(gl.int64) * (outer.to(gl.int64) * UNIT) + k_start.to(gl.int64) * stride
        first += row * outer_rows + k_start
    return (base, table, outer, stride), (box, box_rest, first, kv_head * head_columns, page_rows)


@gluon.jit
def _one(
    done, cleaned, place, given, k_side, v_side, memory,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, TMA: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The blocks of one tile. Returns how many are done then, and how many were cleaned."""
    total, left, right, table, table_stride, work = given
    keys, values = memory
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place
    BLOCK_N: gl.constexpr = keys[0][0].shape[1]
    pages = table
    if PAGE_SIZE > 0:
        pages += row.to(gl.int64) * table_stride
    k_source, k_boxes = _source(k_side, row, head // GROUP, k_start, pages, PAGE_SIZE, UNIT)
    v_source, v_boxes = _source(v_side, row, head // GROUP, k_start, pages, PAGE_SIZE, UNIT)
    shift = kv_len - q_len
    low, high, begin, whole, ragged, end = key_blocks(
        token + shift, gl.minimum(token + TOKENS, q_len) - 1 + shift, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    start = gl.maximum(end - 1, begin) * BLOCK_N
    stop = done + gl.maximum(end - begin, 1)
    if TMA:
        # A sequence's own values are left as they are: tiles that see some of a block weigh the others by 0 anyhow.
        high = gl.where(high > low, kv_len, high)
        low = 0
    _fetch(done, keys, k_source, k_boxes, start, low, high, DIM, PAGE_SIZE, TMA)
    _fetch(done, values, v_source, v_boxes, start, low, high, V_DIM, PAGE_SIZE, TMA)
    _supply(done, 0, keys, k_source, k_boxes, start, low, high, DIM, PAGE_SIZE, TMA, False)
    if stop > done + 1:
        _fetch(done + 1, keys, k_source, k_boxes, start - BLOCK_N, low, high, DIM, PAGE_SIZE, TMA)
    for n in range(done, stop):
        after = start - BLOCK_N
        if n + 1 < stop:
            _supply(n + 1, 0, keys, k_source, k_boxes, after, low, high, DIM, PAGE_SIZE, TMA, False)
        if n + 2 < stop:
            _fetch(n + 2, keys, k_source, k_boxes, after - BLOCK_N, low, high, DIM, PAGE_SIZE, TMA)
        cleaned = _supply(n, cleaned, values, v_source, v_boxes, start, low, high, V_DIM, PAGE_SIZE, TMA, True)
        if n + 1 < stop:
            _fetch(n + 1, values, v_source, v_boxes, after, low, high, V_DIM, PAGE_SIZE, TMA)
        start = after
    return stop, cleaned


@gluon.jit
def produce(
    given, k_side, v_side, memory,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, RAGGED: gl.constexpr,
    UNIT: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, LOOP: gl.constexpr,
):  # fmt: skip
    """Copies the blocks of all tiles of this program, one after the other."""
    total, left, right, table, table_stride, work = given
    done = 0
    cleaned = 0
    if LOOP:
        for turn in range(gl.cdiv(total, gl.num_programs(0))):
            place = tile_of(turn, total, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
            row, head, token, q_start, k_start, out_start, q_len, kv_len = place
            if token < q_len:
                done, cleaned = _one(
                    done, cleaned, place, given, k_side, v_side, memory, GROUP, TOKENS, UNIT, DIM, V_DIM, PAGE_SIZE, TMA,
                    HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
    else:
        place = tile_of(0, total, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
        _one(
            done, cleaned, place, given, k_side, v_side, memory, GROUP, TOKENS, UNIT, DIM, V_DIM, PAGE_SIZE, TMA,
            HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
