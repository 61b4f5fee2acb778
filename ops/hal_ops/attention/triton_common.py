"""What the Triton attention kernels share: which blocks of keys a tile sees, and how one block is folded in.

A tile is ``BLOCK_M`` rows of one kv head; a row is one query token of one query head. ``PACK`` heads of one kv head
share a tile (row ``r`` is token ``r // PACK``, head ``r % PACK``), so that short queries fill it.

The softmax runs online, in base 2: ``top`` is the largest score so far times log2(e), ``total`` the sum of
``2 ** (score - top)``. Scores that are masked are -inf; ``top`` starts at a finite floor, so no difference of
infinities can arise. Blocks whose keys all rows see are folded in without a mask.

Head dims that are no power of two are cut in two powers of two where that is less work than one padded power.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hal_ops._triton_columns import columns_at
from hal_ops.attention._triton_place import key_blocks

__all__ = ["tile"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-3.0e38)
"""Below every score that can occur, and finite."""


@triton.jit
def _load_rows(base, row_offsets, rows_valid, DIM: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr):
    """Columns ``[START, START + BLOCK)`` of rows at ``base + row_offsets``; 0 where a row or a column is none."""
    columns = START + tl.arange(0, BLOCK)
    inside = rows_valid[:, None]
    if START + BLOCK > DIM:
        inside = inside & (columns < DIM)[None, :]
    return tl.load(base + (row_offsets[:, None] + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _start_rows(sinks, slopes, heads, SINKS: tl.constexpr, ALIBI: tl.constexpr, BLOCK_M: tl.constexpr):
    """``top``, ``total`` and the slopes in base 2 before the first block. A sink is a key without a value."""
    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = top
    if SINKS:
        sink = tl.load(sinks + heads) * LOG2E
        top = tl.maximum(sink, FLOOR)
        total = tl.exp2(sink - top)
    if ALIBI:
        slope = tl.load(slopes + heads) * LOG2E
    return top, total, slope


@triton.jit
def _load_keys(
    base, table, start, low, high, page_stride, stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Columns ``[START, START + BLOCK)`` of the keys from ``start`` on. Only keys in ``[low, high)`` are read."""
    rows = tl.arange(0, BLOCK_N)
    columns = START + tl.arange(0, BLOCK)
    places = columns_at(columns, PAGE_SIZE, VECTOR)
    if VECTOR > 0:
        stride = VECTOR
    keys = start + rows
    used = (keys >= low) & (keys < high)
    if PAGE_SIZE == 0:
        base += tl.cast(start, tl.int64) * stride
        pointers = base + (rows[:, None] * stride + places[None, :])
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE_SIZE)
        base += page.to(tl.int64) * page_stride + (start % PAGE_SIZE) * stride
        pointers = base + (rows[:, None] * stride + places[None, :])
    else:
        if MASKED:
            pages = tl.load(table + keys // PAGE_SIZE, mask=used, other=0)
        else:
            pages = tl.load(table + keys // PAGE_SIZE)
        slots = pages.to(tl.int64) * page_stride + (keys % PAGE_SIZE) * stride
        pointers = base + slots[:, None] + places[None, :]
    if MASKED:
        if START + BLOCK > DIM:
            return tl.load(pointers, mask=used[:, None] & (columns < DIM)[None, :], other=0.0)
        return tl.load(pointers, mask=used[:, None], other=0.0)
    if START + BLOCK > DIM:
        return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _fold_block(
    acc, rest, total, top, q, q_rest, k, v, table, start, low, high, position, left, right, scale, cap, slope,
    k_page_stride, k_stride, v_page_stride, v_stride,
    DIM: tl.constexpr, CUT: tl.constexpr, REST: tl.constexpr,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Folds the keys ``[start, start + BLOCK_N)`` into the running softmax; returns ``acc, rest, total, top``.

    ``scale`` is in base 2 if ``PLAIN`` (a positive scale and nothing else done to the scores), where it is multiplied
    in together with the subtraction of ``top``; else see :func:`_bend`. Weights and values are multiplied in ``FORMAT``.
    """
    block = _load_keys(
        k, table, start, low, high, k_page_stride, k_stride, DIM, CUT, 0, BLOCK_N, PAGE_SIZE, MASKED, K_VECTOR
    ).to(q.dtype)  # fmt: skip
    s = tl.dot(q, tl.trans(block), input_precision=PRECISION)
    if REST > 0:
        block = _load_keys(
            k, table, start, low, high, k_page_stride, k_stride, DIM, REST, CUT, BLOCK_N, PAGE_SIZE, MASKED, K_VECTOR
        ).to(q.dtype)  # fmt: skip
        s = tl.dot(q_rest, tl.trans(block), s, input_precision=PRECISION)
    keys = start + tl.arange(0, BLOCK_N)
    if not PLAIN:
        s = _bend(s, keys, position, scale, cap, slope, SOFTCAP, ALIBI)
    if MASKED:
        seen = (keys < high)[None, :]
        if HAS_RIGHT:
            seen = seen & (keys[None, :] <= position[:, None] + right)
        if HAS_LEFT:
            seen = seen & (keys[None, :] >= position[:, None] - left)
        s = tl.where(seen, s, float("-inf"))
    if PLAIN:
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    p = p.to(FORMAT)
    block = _load_keys(
        v, table, start, low, high, v_page_stride, v_stride, V_DIM, V_CUT, 0, BLOCK_N, PAGE_SIZE, MASKED, V_VECTOR
    ).to(FORMAT)  # fmt: skip
    acc = tl.dot(p, block, acc * shrink[:, None], input_precision=PRECISION)
    if V_REST > 0:
        block = _load_keys(
            v, table, start, low, high, v_page_stride, v_stride, V_DIM, V_REST, V_CUT, BLOCK_N, PAGE_SIZE, MASKED,
            V_VECTOR,
        ).to(FORMAT)  # fmt: skip
        rest = tl.dot(p, block, rest * shrink[:, None], input_precision=PRECISION)
    return acc, rest, total, new_top


@triton.jit
def _bend(s, keys, position, scale, cap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Softcap and ALiBi; the result is in base 2.

    With ``SOFTCAP`` scale is ``2 * log2(e) * softmax_scale / softcap``, and ``cap * tanh(x)`` is
    ``cap - 2 * cap / (e^2x + 1)`` with ``cap`` in base 2; the form cannot overflow. Without it scale is in base 2.
    """
    s = s * scale
    if SOFTCAP:
        s = cap - 2.0 * cap / (tl.exp2(s) + 1.0)
    if ALIBI:
        s = s - slope[:, None] * tl.abs(keys[None, :] - position[:, None]).to(tl.float32)
    return s


@triton.jit
def _finish(
    acc, rest, total, top, v_scale, out, lse, rows, lse_rows, valid,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Divides and stores. A row that saw no key, nor a sink, gets 0 and an lse of -inf."""
    nothing = total == 0.0
    factor = v_scale / tl.where(nothing, 1.0, total)
    columns = tl.arange(0, V_CUT)
    inside = valid[:, None] & (columns < V_DIM)[None, :]
    pointers = out + (rows[:, None] + columns[None, :])
    tl.store(pointers, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside)
    if V_REST > 0:
        columns = V_CUT + tl.arange(0, V_REST)
        inside = valid[:, None] & (columns < V_DIM)[None, :]
        pointers = out + (rows[:, None] + columns[None, :])
        tl.store(pointers, (rest * factor[:, None]).to(out.dtype.element_ty), mask=inside)
    if LSE:
        value = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) * LN2)
        tl.store(lse + lse_rows, value, mask=valid)


@triton.jit
def _attend(
    q, q_rest, k, v, table, first, last, kv_len, position, left, right, scale, cap, slope, top, total,
    k_page_stride, k_stride, v_page_stride, v_stride,
    DIM: tl.constexpr, CUT: tl.constexpr, REST: tl.constexpr,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """All blocks of keys that a tile sees: first those that all rows see, then the others, masked."""
    low, high, begin, whole, ragged, end = key_blocks(
        first, last, kv_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, V_CUT], tl.float32)
    rest = tl.zeros([BLOCK_M, V_REST if V_REST > 0 else 16], tl.float32)
    for block in range(whole, ragged):
        acc, rest, total, top = _fold_block(
            acc, rest, total, top, q, q_rest, k, v, table, block * BLOCK_N, low, high, position, left, right,
            scale, cap, slope, k_page_stride, k_stride, v_page_stride, v_stride, DIM, CUT, REST, V_DIM, V_CUT, V_REST,
            BLOCK_N, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, PRECISION, False,
            K_VECTOR, V_VECTOR, FORMAT,
        )  # fmt: skip
    for index in range(begin, end - (ragged - whole)):
        block = tl.where(index < whole, index, index + (ragged - whole))
        acc, rest, total, top = _fold_block(
            acc, rest, total, top, q, q_rest, k, v, table, block * BLOCK_N, low, high, position, left, right,
            scale, cap, slope, k_page_stride, k_stride, v_page_stride, v_stride, DIM, CUT, REST, V_DIM, V_CUT, V_REST,
            BLOCK_N, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, PRECISION, True,
            K_VECTOR, V_VECTOR, FORMAT,
        )  # fmt: skip
    return acc, rest, total, top


@triton.jit
def tile(
    q, k, v, table, out, lse, sinks, slopes, head, token, q_len, kv_len, left, right, scale, cap, v_scale,
    q_stride, q_head_stride, k_page_stride, k_stride, v_page_stride, v_stride, out_stride, out_head_stride,
    HEADS: tl.constexpr, PACK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr, CUT: tl.constexpr, REST: tl.constexpr,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, PLAIN: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    K_VECTOR: tl.constexpr = 0, V_VECTOR: tl.constexpr = 0, KEYS_AS_THEY_ARE: tl.constexpr = False,
):  # fmt: skip
    """The tile whose first row is at ``q``, ``out`` and ``lse``: token ``token`` of its sequence, head ``head``.

    Products are of the output's format, into which q, k and v are converted. With ``KEYS_AS_THEY_ARE`` that of q and k is
    of their own format, FP8, and the weights' and values' of float16: it holds every FP8 number, and is closer to a
    weight than bfloat16 and one conversion nearer to FP8.

    ``k`` and ``v`` are at the first key of the kv head, or with ``PAGE_SIZE`` > 0 at the head's place in page 0. A
    ``VECTOR`` above 0 is what :func:`hal_ops._triton_columns.columns_at` takes.
    """
    TOKENS: tl.constexpr = BLOCK_M // PACK
    FORMAT: tl.constexpr = tl.float16 if KEYS_AS_THEY_ARE else out.dtype.element_ty
    rows = tl.arange(0, BLOCK_M)
    tokens = token + rows // PACK
    valid = (tokens < q_len) & (rows < TOKENS * PACK)
    offsets = (rows // PACK).to(tl.int64) * q_stride + (rows % PACK).to(tl.int64) * q_head_stride
    queries = _load_rows(q, offsets, valid, DIM, CUT, 0)
    queries_rest = queries
    if REST > 0:
        queries_rest = _load_rows(q, offsets, valid, DIM, REST, CUT)
    if not KEYS_AS_THEY_ARE:
        queries, queries_rest = queries.to(FORMAT), queries_rest.to(FORMAT)
    top, total, slope = _start_rows(sinks, slopes, head + rows % PACK, SINKS, ALIBI, BLOCK_M)
    shift = kv_len - q_len
    acc, rest, total, top = _attend(
        queries, queries_rest, k, v, table, token + shift, tl.minimum(token + TOKENS, q_len) - 1 + shift, kv_len,
        tokens + shift, left, right, scale, cap, slope, top, total, k_page_stride, k_stride, v_page_stride, v_stride,
        DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_M, BLOCK_N, PAGE_SIZE,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, PRECISION, K_VECTOR, V_VECTOR, FORMAT,
    )  # fmt: skip
    _finish(
        acc, rest, total, top, v_scale, out, lse, rows // PACK * out_stride + rows % PACK * out_head_stride,
        rows // PACK * HEADS + rows % PACK, valid, V_DIM, V_CUT, V_REST, LSE,
    )  # fmt: skip
