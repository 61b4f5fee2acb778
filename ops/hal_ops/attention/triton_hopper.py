"""Prefill and extend for Hopper's tensor cores, in Gluon: what :mod:`triton_common` does, with the overlap spelled out.

While the tensor cores multiply the weights of one block of keys with its values, the warps compute the softmax of the
next block's scores, whose product was issued first. Triton waits for a product before anything that uses its result and
cannot express this. Keys and values are copied to shared memory asynchronously, one block ahead, two buffers each. Groups
of warps may take turns to multiply (:mod:`hal_ops.attention._hopper_turns`).

FP8 q and k are multiplied as they are; the copying warps convert values to float16.

Blocks are visited from the last to the first. Everything else is as in :mod:`triton_common`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: RUF059, SIM300

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hal_ops.attention._hopper_copy import pair_of_barriers, pair_of_buffers, produce
from hal_ops.attention._hopper_math import (
    fold_block,
    load_queries,
    multiply_keys,
    multiply_values,
    pack,
    product_layout,
    softmax,
    store_rows,
    times,
    wait_values,
)
from hal_ops.attention._hopper_turns import start_turns
from hal_ops.attention._triton_place import key_blocks, place, place_tile

__all__ = ["hopper_extend", "hopper_prefill"]

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FLOOR = gl.constexpr(-3.0e38)


@gluon.jit
def _consume(
    part: gl.constexpr, tile,
    HEADS: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, FENCE: gl.constexpr,
    PARTS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    """A part of a tile: rows ``64 * part`` to ``64 * part + 63``."""
    place, rules, outputs, queries, keys, values, barriers = tile
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    LAYOUT: gl.constexpr = product_layout(BLOCK_N, 4, keys[0].dtype)
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    SPLIT: gl.constexpr = DIM > keys[0].shape[2]
    V_SPLIT: gl.constexpr = V_DIM > values[0].shape[2]
    k_full, k_empty, v_full, v_empty = barriers
    q, q_stride, q_head_stride, head, token, q_len, kv_len = place
    sinks, slopes, left, right, scale, cap = rules
    out, out_stride, out_head_stride, lse, v_scale = outputs
    rows = part * 64 + gl.arange(0, 64, layout=ROWS)
    tokens = token + rows // PACK
    valid = (tokens < q_len) & (rows < TOKENS * PACK)
    offsets = (rows // PACK).to(gl.int64) * q_stride + (rows % PACK).to(gl.int64) * q_head_stride
    queries = load_queries(q, offsets, valid, queries, part, DIM)
    shift = kv_len - q_len
    position = tokens + shift
    low, high, begin, whole, ragged, end = key_blocks(
        token + shift, gl.minimum(token + TOKENS, q_len) - 1 + shift, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    top = gl.full([64], FLOOR, gl.float32, layout=ROWS)
    total = gl.zeros([64], gl.float32, layout=ROWS)
    slope = top
    if SINKS:
        sink = gl.load(sinks + head + rows % PACK) * LOG2E
        top = gl.maximum(sink, FLOOR)
        total = gl.exp2(sink - top)
    if ALIBI:
        slope = gl.load(slopes + head + rows % PACK) * LOG2E
    V_CUT: gl.constexpr = values[0].shape[2]
    acc = gl.zeros([64, V_CUT], gl.float32, layout=product_layout(V_CUT, 4, values[0].dtype))
    rest = acc
    if V_SPLIT:
        V_REST: gl.constexpr = values[1].shape[2]
        rest = gl.zeros([64, V_REST], gl.float32, layout=product_layout(V_REST, 4, values[0].dtype))

    start = gl.maximum(end - 1, begin) * BLOCK_N
    mbarrier.wait(k_full.index(0), 0)
    hopper.fence_async_shared()
    s = hopper.warpgroup_mma_wait(0, deps=(multiply_keys(queries, keys, 0, SPLIT),))
    mbarrier.arrive(k_empty.index(0))
    columns = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    p, shrink, total, top = softmax(
        s, columns, position, high, left, right, scale, cap, slope, top, total,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True, SHORT,
    )  # fmt: skip
    p = pack(p, values[0].dtype)
    mbarrier.wait(v_full.index(0), 0)
    start_turns(part, PARTS, TURNS)
    for j in range(1, end - ragged):
        p, acc, rest, total, top = fold_block(
            j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
            position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True,
            SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT,
        )  # fmt: skip
    for j in range(gl.maximum(end - ragged, 1), end - whole):
        p, acc, rest, total, top = fold_block(
            j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
            position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, False,
            SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT,
        )  # fmt: skip
    if HAS_LEFT:
        for j in range(gl.maximum(end - whole, 1), end - begin):
            p, acc, rest, total, top = fold_block(
                j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
                position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True,
                SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT,
            )  # fmt: skip
    last = gl.maximum(end - begin, 1) - 1
    hopper.fence_async_shared()
    acc, rest = multiply_values(p, acc, rest, values, last & 1, V_SPLIT)
    acc, rest = wait_values(acc, rest, V_SPLIT)

    nothing = total == 0.0
    factor = v_scale / gl.where(nothing, 1.0, total)
    offsets = rows // PACK * out_stride + rows % PACK * out_head_stride
    store_rows(out, offsets, valid, times(acc, factor), V_DIM, V_CUT, 0)
    if V_SPLIT:
        store_rows(out, offsets, valid, times(rest, factor), V_DIM, V_REST, V_CUT)
    if LSE:
        value = gl.where(nothing, float("-inf"), (top + gl.log2(gl.where(nothing, 1.0, total))) * LN2)
        gl.store(lse + (rows // PACK * HEADS + rows % PACK), value, mask=valid)


@gluon.jit
def _tile(
    q, k_source, v_source, k_boxes, v_boxes, out, lse, sinks, slopes, head, token, q_len, kv_len,
    left, right, scale, cap, v_scale, q_stride, q_head_stride, out_stride, out_head_stride,
    HEADS: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr,
    DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    """The tile of ``64 * PARTS`` rows whose first, ``token`` of ``head``, is at ``q``, ``out`` and ``lse``."""
    TOKENS: gl.constexpr = 64 * PARTS // PACK
    dtype: gl.constexpr = q.dtype.element_ty
    FP8: gl.constexpr = dtype.primitive_bitwidth == 8
    queries = pair_of_buffers(dtype, PARTS, 64, CUT, REST)
    keys = pair_of_buffers(dtype, 2, BLOCK_N, CUT, REST)
    values = pair_of_buffers(gl.float16 if FP8 else dtype, 2, BLOCK_N, V_CUT, V_REST)
    ARRIVALS: gl.constexpr = 1 if TMA else 128
    full, empty = pair_of_barriers(ARRIVALS), pair_of_barriers(PARTS)
    barriers = (full, empty, pair_of_barriers(ARRIVALS), pair_of_barriers(PARTS))
    raw, raw_full = values, barriers[2]
    if FP8:
        gl.static_assert(V_REST == 0, "FP8 values are converted in one part")
        raw, raw_full = pair_of_buffers(dtype, 2, BLOCK_N, V_CUT, 0), pair_of_barriers(1)
    if not SINKS:
        sinks = lse
    if not ALIBI:
        slopes = lse
    tile = (
        (q, q_stride, q_head_stride, head, token, q_len, kv_len),
        (sinks, slopes, left, right, scale, cap),
        (out, out_stride, out_head_stride, lse, v_scale),
        queries, keys, values, barriers,
    )  # fmt: skip
    copy = (
        k_source, v_source, k_boxes, v_boxes, token, q_len, kv_len, left, right, keys, values, barriers, raw, raw_full
    )  # fmt: skip
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, tile, HEADS, PACK, TOKENS, DIM, V_DIM, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN,
                            LSE, not TMA, PARTS, TURNS, SHORT)),
                (_consume, (1, tile, HEADS, PACK, TOKENS, DIM, V_DIM, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN,
                            LSE, not TMA, PARTS, TURNS, SHORT)),
                (produce, (copy, TOKENS, DIM, V_DIM, PAGE_SIZE, TMA, HAS_LEFT, HAS_RIGHT)),
            ],
            [4, 4], [REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, tile, HEADS, PACK, TOKENS, DIM, V_DIM, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN,
                            LSE, not TMA, PARTS, TURNS, SHORT)),
                (_consume, (1, tile, HEADS, PACK, TOKENS, DIM, V_DIM, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN,
                            LSE, not TMA, PARTS, TURNS, SHORT)),
                (_consume, (2, tile, HEADS, PACK, TOKENS, DIM, V_DIM, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN,
                            LSE, not TMA, PARTS, TURNS, SHORT)),
                (produce, (copy, TOKENS, DIM, V_DIM, PAGE_SIZE, TMA, HAS_LEFT, HAS_RIGHT)),
            ],
            [4, 4, 4], [REGISTERS, REGISTERS, COPY_REGISTERS],
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "k_batch_rows", "k_head_rows", "k_head_columns", "v_batch_rows", "v_head_rows", "v_head_columns",
        "batch", "q_len", "kv_len", "blocks", "section", "left", "right",
        "q_batch_units", "k_batch_units", "v_batch_units",
    ],
    do_not_specialize_on_alignment=["sinks", "slopes", "q_scale", "k_scale", "v_scale", "cu_q", "cu_k"],
)  # fmt: skip
def hopper_prefill(
    k_box, k_box_rest, k_batch_rows, k_head_rows, k_head_columns,
    v_box, v_box_rest, v_batch_rows, v_head_rows, v_head_columns,
    q, k, v, out, lse, sinks, slopes, q_scale, k_scale, v_scale, cu_q, cu_k,
    batch, q_len, kv_len, blocks, section, left, right, scale, cap,
    q_batch_units, q_stride, q_head_stride, k_batch_units, k_stride, k_head_stride,
    v_batch_units, v_stride, v_head_stride, out_stride, out_head_stride,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, RAGGED: gl.constexpr, UNIT: gl.constexpr,
    DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr,
    Q_SCALES: gl.constexpr, K_SCALES: gl.constexpr, V_SCALES: gl.constexpr,
):  # fmt: skip
    """The same as :func:`hal_ops.attention.triton_prefill.prefill_kernel`."""
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place(
        cu_q, cu_k, batch, q_len, kv_len, blocks, section, HEADS // PACK, PACK, 64 * PARTS // PACK, RAGGED
    )
    if token >= q_len:
        return
    q += row.to(gl.int64) * (q_batch_units.to(gl.int64) * UNIT) + (q_start + token).to(gl.int64) * q_stride
    q += head.to(gl.int64) * q_head_stride
    k += row.to(gl.int64) * (k_batch_units.to(gl.int64) * UNIT) + k_start.to(gl.int64) * k_stride
    k += (head // GROUP).to(gl.int64) * k_head_stride
    v += row.to(gl.int64) * (v_batch_units.to(gl.int64) * UNIT) + k_start.to(gl.int64) * v_stride
    v += (head // GROUP).to(gl.int64) * v_head_stride
    out += (out_start + token).to(gl.int64) * out_stride + head * out_head_stride
    lse += (out_start + token).to(gl.int64) * HEADS + head
    if Q_SCALES > 0:
        scale *= gl.load(q_scale + (head // GROUP if Q_SCALES > 1 else 0))
    if K_SCALES > 0:
        scale *= gl.load(k_scale + (head // GROUP if K_SCALES > 1 else 0))
    factor = 1.0
    if V_SCALES > 0:
        factor = gl.load(v_scale + (head // GROUP if V_SCALES > 1 else 0))
    k_row = row * k_batch_rows + head // GROUP * k_head_rows + k_start
    v_row = row * v_batch_rows + head // GROUP * v_head_rows + k_start
    _tile(
        q, (k, lse, 0, k_stride), (v, lse, 0, v_stride),
        (k_box, k_box_rest, k_row, head // GROUP * k_head_columns, 0),
        (v_box, v_box_rest, v_row, head // GROUP * v_head_columns, 0),
        out, lse, sinks, slopes, head, token, q_len, kv_len, left, right, scale, cap, factor,
        q_stride, q_head_stride, out_stride, out_head_stride,
        HEADS, PACK, 0, True, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PARTS, REGISTERS, COPY_REGISTERS,
        TURNS, SHORT,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "k_page_rows", "k_head_rows", "k_head_columns", "v_page_rows", "v_head_rows", "v_head_columns",
        "left", "right", "table_stride",
    ],
    do_not_specialize_on_alignment=["sinks", "slopes", "k_scale", "v_scale", "tiles", "cu_q", "kv_lens", "table"],
)  # fmt: skip
def hopper_extend(
    k_box, k_box_rest, k_page_rows, k_head_rows, k_head_columns,
    v_box, v_box_rest, v_page_rows, v_head_rows, v_head_columns,
    q, k, v, out, lse, sinks, slopes, k_scale, v_scale, tiles, cu_q, kv_lens, table, left, right, scale, cap,
    q_stride, q_head_stride, k_page_stride, k_stride, k_head_stride, v_page_stride, v_stride, v_head_stride,
    out_stride, out_head_stride, table_stride,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr,
    DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr,
):  # fmt: skip
    """The same as :func:`hal_ops.attention.triton_extend.extend_kernel`, without FP8."""
    row, head, token, q_start, q_len, kv_len = place_tile(tiles, cu_q, kv_lens, HEADS // PACK, PACK)
    if row < 0:
        return
    q += (q_start + token).to(gl.int64) * q_stride + head.to(gl.int64) * q_head_stride
    k += (head // GROUP).to(gl.int64) * k_head_stride
    v += (head // GROUP).to(gl.int64) * v_head_stride
    table += row.to(gl.int64) * table_stride
    out += (q_start + token).to(gl.int64) * out_stride + head * out_head_stride
    lse += (q_start + token).to(gl.int64) * HEADS + head
    _tile(
        q, (k, table, k_page_stride, k_stride), (v, table, v_page_stride, v_stride),
        (k_box, k_box_rest, head // GROUP * k_head_rows, head // GROUP * k_head_columns, k_page_rows),
        (v_box, v_box_rest, head // GROUP * v_head_rows, head // GROUP * v_head_columns, v_page_rows),
        out, lse, sinks, slopes, head, token, q_len, kv_len, left, right, scale, cap, 1.0,
        q_stride, q_head_stride, out_stride, out_head_stride,
        HEADS, PACK, PAGE_SIZE, TMA, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PARTS, REGISTERS, COPY_REGISTERS,
        TURNS, SHORT,
    )  # fmt: skip
