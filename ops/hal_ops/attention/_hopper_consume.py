"""The warp groups of the Hopper kernels that compute: each takes 64 rows of every tile of its program."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: RUF059, SIM300

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hal_ops.attention._hopper_math import (
    fetch_queries,
    fold_block,
    multiply_keys,
    multiply_values,
    pack,
    product_layout,
    put_queries,
    rounded,
    softmax,
    store_rows,
    times,
    wait_values,
)
from hal_ops.attention._hopper_tiles import tile_of
from hal_ops.attention._hopper_turns import start_turns
from hal_ops.attention._triton_place import key_blocks

__all__ = ["consume"]

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FLOOR = gl.constexpr(-3.0e38)


@gluon.jit
def _scale(scales, head, GROUP: gl.constexpr, COUNT: gl.constexpr):
    """What FP8 values of a head are multiplied by: 1, one scale for all, or one a kv head."""
    factor = 1.0
    if COUNT > 0:
        factor = gl.load(scales + (head // GROUP if COUNT > 1 else 0))
    return factor


@gluon.jit
def _fetch(
    place, q_side, queries, rows,
    PACK: gl.constexpr, TOKENS: gl.constexpr, UNIT: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """The queries of a tile, in registers."""
    q, q_batch_units, q_stride, q_head_stride = q_side
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place
    q += row.to(gl.int64) * (q_batch_units.to(gl.int64) * UNIT) + (q_start + token).to(gl.int64) * q_stride
    q += head.to(gl.int64) * q_head_stride
    offsets = (rows // PACK).to(gl.int64) * q_stride + (rows % PACK).to(gl.int64) * q_head_stride
    return fetch_queries(q, offsets, (token + rows // PACK < q_len) & (rows < TOKENS * PACK), queries, DIM)


@gluon.jit
def _begin(part: gl.constexpr, done, place, fetched, rows, memory, DIM: gl.constexpr, ROUND_Q: gl.constexpr):
    """Issues the product of a tile's queries with its last block of keys, and waits for neither; nothing is in it, and
    nothing is waited for, where there is no such tile. Returns the product, and what its rows are to be multiplied by."""
    queries, keys, values, barriers = memory
    k_full, k_empty, v_full, v_empty = barriers
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place
    step = rows
    if ROUND_Q:
        fetched, step = rounded(fetched, rows)
    mine = put_queries(fetched, queries, part, DIM)
    if token < q_len:
        mbarrier.wait(k_full.index(done & 1), (done >> 1) & 1)
    hopper.fence_async_shared()
    return multiply_keys(mine, keys, done & 1, DIM > keys[0].shape[2]), step


@gluon.jit
def _start_rows(
    rows, head, sinks, slopes, PACK: gl.constexpr, SINKS: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """``top, total, slope`` before the first block."""
    LAYOUT: gl.constexpr = rows.type.layout
    top = gl.full([64], FLOOR, gl.float32, layout=LAYOUT)
    total = gl.zeros([64], gl.float32, layout=LAYOUT)
    slope = top
    if SINKS:
        sink = gl.load(sinks + head + rows % PACK) * LOG2E
        top = gl.maximum(sink, FLOOR)
        total = gl.exp2(sink - top)
    if ALIBI:
        slope = gl.load(slopes + head + rows % PACK) * LOG2E
    return top, total, slope


@gluon.jit
def _store(
    out, lse, strides, tokens, rows, acc, rest, top, total, v_scale,
    HEADS: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, V_DIM: gl.constexpr,
    V_CUT: gl.constexpr, V_REST: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """The results of a tile whose first row is at ``out`` and ``lse``, of which so many tokens are there."""
    out_stride, out_head_stride = strides
    valid = (rows // PACK < tokens) & (rows < TOKENS * PACK)
    nothing = total == 0.0
    factor = v_scale / gl.where(nothing, 1.0, total)
    offsets = rows // PACK * out_stride + rows % PACK * out_head_stride
    store_rows(out, offsets, valid, times(acc, factor), V_DIM, V_CUT, 0)
    if V_REST > 0:
        store_rows(out, offsets, valid, times(rest, factor), V_DIM, V_REST, V_CUT)
    if LSE:
        value = gl.where(nothing, float("-inf"), (top + gl.log2(gl.where(nothing, 1.0, total))) * LN2)
        gl.store(lse + (rows // PACK * HEADS + rows % PACK), value, mask=valid)


@gluon.jit
def _attend(
    part: gl.constexpr, done, place, s, rules, scale, rows, queries, keys, values, barriers,
    PACK: gl.constexpr, TOKENS: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, FENCE: gl.constexpr,
    PARTS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """A tile but for its first product, which is ``s``, and for its last, which is issued.

    Returns ``acc, rest, total, top`` and how many blocks are done then.
    """
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    LAYOUT: gl.constexpr = product_layout(BLOCK_N, 4, keys[0].dtype)
    SPLIT: gl.constexpr = DIM > keys[0].shape[2]
    V_CUT: gl.constexpr = values[0].shape[2]
    V_SPLIT: gl.constexpr = V_DIM > V_CUT
    k_full, k_empty, v_full, v_empty = barriers
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place
    sinks, slopes, left, right, cap = rules
    shift = kv_len - q_len
    position = token + rows // PACK + shift
    low, high, begin, whole, ragged, end = key_blocks(
        token + shift, gl.minimum(token + TOKENS, q_len) - 1 + shift, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    top, total, slope = _start_rows(rows, head, sinks, slopes, PACK, SINKS, ALIBI)
    acc = gl.zeros([64, V_CUT], gl.float32, layout=product_layout(V_CUT, 4, values[0].dtype))
    rest = acc
    if V_SPLIT:
        V_REST: gl.constexpr = values[1].shape[2]
        rest = gl.zeros([64, V_REST], gl.float32, layout=product_layout(V_REST, 4, values[0].dtype))

    first = gl.maximum(end - 1, begin)
    mbarrier.arrive(k_empty.index(done & 1))
    columns = first * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    p, shrink, total, top = softmax(
        s, columns, position, high, left, right, scale, cap, slope, top, total,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True, SHORT, BY_ROW,
    )  # fmt: skip
    p = pack(p, values[0].dtype)
    mbarrier.wait(v_full.index(done & 1), (done >> 1) & 1)
    if done == 0:
        start_turns(part, PARTS, TURNS)
    for j in range(1, end - ragged):
        p, acc, rest, total, top = fold_block(
            done + j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
            position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True,
            SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT, BY_ROW,
        )  # fmt: skip
    for j in range(gl.maximum(end - ragged, 1), end - whole):
        p, acc, rest, total, top = fold_block(
            done + j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
            position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, False,
            SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT, BY_ROW,
        )  # fmt: skip
    if HAS_LEFT:
        for j in range(gl.maximum(end - whole, 1), end - begin):
            p, acc, rest, total, top = fold_block(
                done + j, (end - 1 - j) * BLOCK_N, p, acc, rest, total, top, queries, keys, values, barriers, high,
                position, left, right, scale, cap, slope, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, True,
                SPLIT, V_SPLIT, FENCE, part, PARTS, TURNS, SHORT, BY_ROW,
            )  # fmt: skip
    done += gl.maximum(end - begin, 1)
    hopper.fence_async_shared()
    acc, rest = multiply_values(p, acc, rest, values, (done - 1) & 1, V_SPLIT)
    return acc, rest, total, top, done


@gluon.jit
def _one(
    part: gl.constexpr, turn, done, place, s, step, rows, given, q_side, out_side, scales, memory,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, RAGGED: gl.constexpr,
    UNIT: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, FENCE: gl.constexpr,
    PARTS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, LOOP: gl.constexpr,
    Q_SCALES: gl.constexpr, K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, ROUND_Q: gl.constexpr,
):  # fmt: skip
    """One tile, whose first product is ``s``. Returns how many blocks are done then.

    With ``LOOP`` the first product of the next tile is made while this one's rows are stored: returned are where that
    tile is, the product, and what its rows are to be multiplied by.
    """
    total_tiles, rules, scale, work = given
    q_scale, k_scale, v_scale = scales
    queries, keys, values, barriers = memory
    k_full, k_empty, v_full, v_empty = barriers
    SPLIT: gl.constexpr = DIM > keys[0].shape[2]
    V_SPLIT: gl.constexpr = V_DIM > values[0].shape[2]
    V_REST: gl.constexpr = values[1].shape[2] if V_SPLIT else 0
    out, out_stride, out_head_stride, lse = out_side
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place
    out += (out_start + token).to(gl.int64) * out_stride + head * out_head_stride
    lse += (out_start + token).to(gl.int64) * HEADS + head
    factor = scale * _scale(q_scale, head, GROUP, Q_SCALES) * _scale(k_scale, head, GROUP, K_SCALES)
    if ROUND_Q:
        factor = factor * step
    mine = (queries[0].index(part), queries[1].index(part))
    acc, rest, total, top, done = _attend(
        part, done, place, s, rules, factor, rows, mine, keys, values, barriers, PACK, TOKENS, DIM, V_DIM,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, FENCE, PARTS, TURNS, SHORT, ROUND_Q,
    )  # fmt: skip
    after = place
    if LOOP:
        after = tile_of(turn + 1, total_tiles, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
        fetched = _fetch(after, q_side, queries, rows, PACK, TOKENS, UNIT, DIM)
        s, step = _begin(part, done, after, fetched, rows, memory, DIM, ROUND_Q)
        acc, rest = wait_values(acc, rest, V_SPLIT, 2 if SPLIT else 1)
        mbarrier.arrive(v_empty.index((done - 1) & 1))
    else:
        acc, rest = wait_values(acc, rest, V_SPLIT, 0)
    _store(
        out, lse, (out_stride, out_head_stride), q_len - token, rows, acc, rest, top, total,
        _scale(v_scale, head, GROUP, V_SCALES), HEADS, PACK, TOKENS, V_DIM, values[0].shape[2], V_REST, LSE,
    )  # fmt: skip
    if LOOP:
        s = hopper.warpgroup_mma_wait(0, deps=(s,))
    return done, after, s, step


@gluon.jit
def consume(
    part: gl.constexpr, given, q_side, out_side, scales, memory,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, RAGGED: gl.constexpr,
    UNIT: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, FENCE: gl.constexpr,
    PARTS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, LOOP: gl.constexpr,
    Q_SCALES: gl.constexpr, K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, ROUND_Q: gl.constexpr,
):  # fmt: skip
    """Rows ``64 * part`` to ``64 * part + 63`` of each tile."""
    total, rules, scale, work = given
    queries, keys, values, barriers = memory
    LAYOUT: gl.constexpr = product_layout(keys[0].shape[1], 4, keys[0].dtype)
    rows = part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    place = tile_of(0, total, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
    done = 0
    fetched = _fetch(place, q_side, queries, rows, PACK, TOKENS, UNIT, DIM)
    s, step = _begin(part, done, place, fetched, rows, memory, DIM, ROUND_Q)
    s = hopper.warpgroup_mma_wait(0, deps=(s,))
    if LOOP:
        for turn in range(gl.cdiv(total, gl.num_programs(0))):
            row, head, token, q_start, k_start, out_start, q_len, kv_len = place
            if token < q_len:
                done, place, s, step = _one(
                    part, turn, done, place, s, step, rows, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK,
                    TOKENS, RAGGED, UNIT, DIM, V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE,
                    FENCE, PARTS, TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q,
                )  # fmt: skip
            else:
                place = tile_of(turn + 1, total, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
                fetched = _fetch(place, q_side, queries, rows, PACK, TOKENS, UNIT, DIM)
                s, step = _begin(part, done, place, fetched, rows, memory, DIM, ROUND_Q)
                s = hopper.warpgroup_mma_wait(0, deps=(s,))
    else:
        _one(
            part, 0, done, place, s, step, rows, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK,
            TOKENS, RAGGED, UNIT, DIM, V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE,
            FENCE, PARTS, TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q,
        )  # fmt: skip
