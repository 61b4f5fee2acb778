"""The device code of :mod:`hal_ops.attention.triton_decode`: one kernel. A row's last program merges its splits.

A program is one work item (some keys of one row) and one tile: up to ``BLOCK_M`` pairs of a query token and a query
head of one kv head; pair ``m`` is token ``m // GROUP``, head ``m % GROUP``. Scores are in base 2.

A work item is eight int32: row, first token, tokens, keys of the row, first and end key of the item, the item's slot
among the partial results, and ``splits * 65536 + index`` of the row's splits. An item of no tokens does nothing; one of
no keys writes zeros and an LSE of -inf.

With ``PAIRS`` (``"e4m3x2"`` or ``"e5m2x2"``) two neighbours of a value are loaded as one int16, so that they go from
shared memory to the tensor cores like any 16-bit numbers; single bytes would be picked one by one. The even and the odd
columns of the output are summed apart.

The programs of a split row each leave their partial result in memory and count themselves; the one that comes last
merges all, in the order of the keys, so the result does not depend on which it is, and sets the count back to zero for
the next launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hal_ops._triton_columns import columns_at

__all__ = ["decode_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(8)


@triton.jit
def _finite(x):
    """-inf as 0, to be subtracted from scores."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _exponent(x):
    """The power of two just at or below ``x`` > 0, and its inverse, both exact."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return power, inverse


@triton.jit
def _unpaired(pairs, PAIRS: tl.constexpr):
    """The FP8 numbers in the low and in the high bytes of int16, in float16, by PTX's conversion of pairs."""
    both = tl.inline_asm_elementwise(
        "cvt.rn.f16x2." + PAIRS + " $0, $1;", "=r,h", [pairs], dtype=tl.int32, is_pure=True, pack=1
    )
    even = both.to(tl.int16).to(tl.float16, bitcast=True)
    odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return even, odd


@triton.jit
def _pages(table, start, end, n, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the keys from ``start`` on, each key's own or, where they share one, that one."""
    if PAGE_SIZE % BLOCK_N == 0:
        pages = tl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
    elif BLOCK_N % PAGE_SIZE == 0:
        table += start // PAGE_SIZE
        pages = tl.load(table + n // PAGE_SIZE, mask=start + n < end, other=0)
    else:
        pages = tl.load(table + (start + n) // PAGE_SIZE, mask=start + n < end, other=0)
    return pages


@triton.jit
def _offsets(
    pages, start, n, page_stride, slot_stride, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where the keys from ``start`` on are in the cache, 64 bits. ``start`` is a multiple of the block."""
    if PAGE_SIZE % BLOCK_N == 0:
        offsets = (pages.to(tl.int64) * page_stride + start % PAGE_SIZE * slot_stride) + n * slot_stride
    elif BLOCK_N % PAGE_SIZE == 0:
        offsets = pages.to(tl.int64) * page_stride + n % PAGE_SIZE * slot_stride
    else:
        offsets = pages.to(tl.int64) * page_stride + (start + n) % PAGE_SIZE * slot_stride
    return offsets


@triton.jit
def _scores(s, keys, position, factor, cap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Products of q and k as scores in base 2."""
    s *= factor[:, None]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        s = cap * LOG2E * (1.0 - 2.0 / (tl.exp2(s * (2.0 / cap)) + 1.0))
    if ALIBI:
        s -= slope[:, None] * tl.abs(keys[None, :] - position[:, None]).to(tl.float32)
    return s


@triton.jit
def _merge(
    partial_out, partial_lse, splits, stride,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The splits of one row and tile, merged in order: out ``[BLOCK_R, BLOCK_DV]``, and top and total in base 2."""
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_DV)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    wide = tl.full((), stride, tl.int64)
    for first in tl.range(0, splits, AT_ONCE):
        # Nothing but arithmetic depends on the split before, so the loads of all of these are under way together.
        for ahead in tl.static_range(AT_ONCE):
            inside = (r < ROWS) & (r * 0 + (first + ahead) < splits)
            at = (first + ahead) * wide
            lse = tl.load(partial_lse + at + r, mask=inside, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(
                (partial_out + at * V_DIM) + (r[:, None] * V_DIM + d[None, :]),
                mask=inside[:, None] & (d < V_DIM)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            new_top = tl.maximum(top, lse)
            base = _finite(new_top)
            weight = tl.exp2(lse - base)
            old = tl.exp2(top - base)
            out = out * old[:, None] + part * weight[:, None]
            total = total * old + weight
            top = new_top
    return out, top, total


@triton.jit
def _store(
    out, lse, acc, top, total, sinks, heads, places, valid,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Writes the rows of a tile. ``acc`` is the sum of values, ``total`` of weights ``2 ** (score - top)``."""
    if SINKS:
        sink = tl.load(sinks + heads, mask=valid, other=float("-inf")) * LOG2E
        new_top = tl.maximum(top, sink)
        base = _finite(new_top)
        old = tl.exp2(top - base)
        acc = acc * old[:, None]
        total = total * old + tl.exp2(sink - base)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    d = tl.arange(0, BLOCK_DV)
    mask = valid[:, None] & (d < V_DIM)[None, :]
    tl.store(out + (places[:, None] * V_DIM + d[None, :]), acc.to(out.dtype.element_ty), mask=mask)
    if LSE:
        tl.store(lse + places, (top + tl.log2(total)) * LN2, mask=valid)


@triton.jit(
    do_not_specialize=["tokens", "table_stride"],
    do_not_specialize_on_alignment=["table", "sinks", "slopes", "k_scale", "v_scale"],
)
def decode_kernel(
    q, k_cache, v_cache, out, lse, work, table, partial_out, partial_lse, counters, sinks, slopes, k_scale, v_scale,
    tokens, scale, cap,
    q_token_stride, q_head_stride,
    k_page_stride, k_slot_stride, k_head_stride,
    v_page_stride, v_slot_stride, v_head_stride,
    table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    SCALES: tl.constexpr, FP8: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, STAGES: tl.constexpr, SAME: tl.constexpr,
    PAIRS: tl.constexpr, K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid: ``(items * KV_HEADS * TILES,)``. ``LEFT`` and ``RIGHT`` are -1 for no limit; ``SCALES`` 0, 1 or a head."""
    program = tl.program_id(0)
    item = program // (KV_HEADS * TILES)
    tile = program % TILES
    head = (program // TILES) % KV_HEADS
    work += item * FIELDS
    q_len = tl.load(work + 2)
    if q_len == 0:
        return
    row = tl.load(work)
    first_token = tl.load(work + 1)
    kv_len = tl.load(work + 3)
    begin = tl.load(work + 4)
    end = tl.load(work + 5)
    slot = tl.load(work + 6)
    split = tl.load(work + 7)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = m // GROUP
    heads = head * GROUP + m % GROUP
    valid = (token < q_len) & (first_token + token < tokens)
    position = kv_len - q_len + token
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    COLUMNS: tl.constexpr = BLOCK_DV if PAIRS == "" else BLOCK_DV // 2
    dv = tl.arange(0, COLUMNS)
    k_columns = columns_at(d, PAGE_SIZE, K_VECTOR)
    v_columns = columns_at(dv, PAGE_SIZE, V_VECTOR)
    if K_VECTOR > 0:
        k_slot_stride = K_VECTOR
        v_slot_stride = V_VECTOR

    q += first_token.to(tl.int64) * q_token_stride
    q_offsets = (token * q_token_stride + heads * q_head_stride)[:, None] + d[None, :]
    queries = tl.load(q + q_offsets, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    factor = tl.full([BLOCK_M], scale * LOG2E, tl.float32)
    if SCALES > 0:
        factor *= tl.load(k_scale + head * (SCALES - 1))
    if FP8:
        # e4m3 and e5m2 are exact in float16, and so is q once its largest element is near 1.
        power, inverse = _exponent(tl.max(tl.abs(queries.to(tl.float32)), 1))
        queries = (queries.to(tl.float32) * inverse[:, None]).to(tl.float16)
        factor *= power
    slope = factor
    if ALIBI:
        slope = tl.load(slopes + heads, mask=valid, other=0.0) * LOG2E

    table += row.to(tl.int64) * table_stride
    k_cache += head.to(tl.int64) * k_head_stride
    v_cache += head.to(tl.int64) * v_head_stride
    v_pairs = v_cache
    if PAIRS != "":
        v_pairs = v_cache.to(tl.pointer_type(tl.int16), bitcast=True)
    low = begin
    if LEFT >= 0:
        low = tl.maximum(begin, kv_len - q_len - LEFT)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over the keys of a block after the loop: programs of several warps exchange one number less a block.
    totals = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd_acc = acc
    pages = _pages(table, begin, end, n, PAGE_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = start + n
        used = keys < end
        if LEFT >= 0:
            used = used & (keys >= low)
        k_offsets = _offsets(pages, start, n, k_page_stride, k_slot_stride, PAGE_SIZE, BLOCK_N)
        v_offsets = k_offsets
        if not SAME:
            v_offsets = _offsets(pages, start, n, v_page_stride, v_slot_stride, PAGE_SIZE, BLOCK_N)
        k_pointers = k_cache + k_offsets[:, None]
        pages = _pages(table, start + BLOCK_N, end, n, PAGE_SIZE, BLOCK_N)
        k = tl.load(k_pointers + k_columns[None, :], mask=used[:, None] & (d < DIM)[None, :], other=0.0)
        s = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision=PRECISION)
        s = _scores(s, keys, position, factor, cap, slope, SOFTCAP, ALIBI)
        seen = used[None, :]
        if RIGHT >= 0:
            seen = seen & (keys[None, :] <= position[:, None] + RIGHT)
        if LEFT >= 0:
            seen = seen & (keys[None, :] >= position[:, None] - LEFT)
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = _finite(new_top)
        p = tl.exp2(s - base[:, None])
        old = tl.exp2(top - base)
        totals = totals * old[:, None] + p
        acc = acc * old[:, None]
        p = p.to(queries.dtype)
        if PAIRS == "":
            v_pointers = v_cache + v_offsets[:, None]
            v_mask = used[:, None] & (dv < V_DIM)[None, :]
            v = tl.load(v_pointers + v_columns[None, :], mask=v_mask, other=0.0)
            acc = tl.dot(p, v.to(queries.dtype), acc, input_precision=PRECISION)
        else:
            v_pointers = v_pairs + (v_offsets // 2)[:, None]
            v_mask = used[:, None] & (dv < V_DIM // 2)[None, :]
            pairs = tl.load(v_pointers + v_columns[None, :], mask=v_mask, other=0)
            even, odd = _unpaired(pairs, PAIRS)
            acc = tl.dot(p, even, acc)
            odd_acc = tl.dot(p, odd, odd_acc * old[:, None])
        top = new_top
    total = tl.sum(totals, 1)
    if PAIRS != "":
        acc = tl.reshape(tl.join(acc, odd_acc), [BLOCK_M, BLOCK_DV])
    if SCALES > 0:
        acc *= tl.load(v_scale + head * (SCALES - 1))

    out += first_token.to(tl.int64) * (KV_HEADS * GROUP * V_DIM)
    lse += first_token.to(tl.int64) * (KV_HEADS * GROUP)
    splits = split >> 16
    if splits == 1:
        places = token * (KV_HEADS * GROUP) + heads
        _store(out, lse, acc, top, total, sinks, heads, places, valid, V_DIM, BLOCK_DV, SINKS, LSE)
    else:
        stride = KV_HEADS * TILES * ROWS
        first = (slot - (split & 0xFFFF)).to(tl.int64) * stride + (head * TILES + tile) * ROWS
        partial_out += first * V_DIM
        partial_lse += first
        mine = (split & 0xFFFF).to(tl.int64) * stride
        local = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_DV)
        kept = valid & (local < ROWS)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        own = (partial_out + mine * V_DIM) + (local[:, None] * V_DIM + columns[None, :])
        tl.store(own, acc, mask=kept[:, None] & (columns < V_DIM)[None, :])
        tl.store(partial_lse + mine + local, top + tl.log2(total), mask=kept)
        counters += (slot - (split & 0xFFFF)) * (KV_HEADS * TILES) + head * TILES + tile
        tl.debug_barrier()
        before = tl.atomic_add(counters, 1, sem="acq_rel")
        if before == splits - 1:
            tl.debug_barrier()
            merged, top_r, total_r = _merge(
                partial_out, partial_lse, splits, stride, ROWS, BLOCK_R, AT_ONCE, V_DIM, BLOCK_DV
            )
            m_r = tile * BLOCK_M + tl.arange(0, BLOCK_R)
            token_r = m_r // GROUP
            heads_r = head * GROUP + m_r % GROUP
            valid_r = (tl.arange(0, BLOCK_R) < ROWS) & (token_r < q_len) & (first_token + token_r < tokens)
            places_r = token_r * (KV_HEADS * GROUP) + heads_r
            _store(out, lse, merged, top_r, total_r, sinks, heads_r, places_r, valid_r, V_DIM, BLOCK_DV, SINKS, LSE)
            tl.store(counters, 0)
