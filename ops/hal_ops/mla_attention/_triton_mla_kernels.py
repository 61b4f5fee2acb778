"""The device code of :mod:`hal_ops.mla_attention.triton_mla`: attention to cache entries, and the merge of splits.

A program is one work item (some keys of one row) and one tile: up to ``BLOCK_M`` pairs of a query token and a head;
pair ``m`` is token ``m // HEADS``, head ``m % HEADS``. A work item is what :mod:`hal_ops.attention._decode_work` says.
Scores are in base 2.

A block of latents is read once: it is the first part of the keys, and it is the values. One of an FP8 cache is
converted to the format of the queries, which holds its values exactly; its scale goes to the scores and to the sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hal_ops.attention._triton_decode_kernels import _finite, _merge, _offsets, _pages, _store

__all__ = ["merge_kernel", "mla_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
FIELDS = tl.constexpr(8)


@triton.jit(do_not_specialize=["tokens", "table_stride"], do_not_specialize_on_alignment=["table", "kv_scale"])
def mla_kernel(
    q, cache, out, lse, work, table, partial_out, partial_lse, kv_scale, tokens, scale,
    q_token_stride, q_head_stride, page_stride, slot_stride, table_stride,
    HEADS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: ``(items * TILES,)``. ``MASKED``: a query does not see the keys behind it. ``SCALED``: the cache is FP8."""
    program = tl.program_id(0)
    item = program // TILES
    tile = program % TILES
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
    token = m // HEADS
    heads = m % HEADS
    valid = (token < q_len) & (first_token + token < tokens)
    position = kv_len - q_len + token
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, RANK)
    r = tl.arange(0, BLOCK_P)

    q += first_token.to(tl.int64) * q_token_stride
    q_rows = q + (token * q_token_stride + heads * q_head_stride)[:, None]
    q_latent = tl.load(q_rows + d[None, :], mask=valid[:, None], other=0.0)
    q_rope = tl.load(q_rows + (RANK + r)[None, :], mask=valid[:, None] & (r < ROPE)[None, :], other=0.0)
    factor = scale * LOG2E
    if SCALED:
        value_scale = tl.load(kv_scale)
        factor *= value_scale

    table += row.to(tl.int64) * table_stride
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    pages = _pages(table, begin, end, n, PAGE_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        keys = start + n
        used = keys < end
        entries = cache + _offsets(pages, start, n, page_stride, slot_stride, PAGE_SIZE, BLOCK_N)[:, None]
        pages = _pages(table, start + BLOCK_N, end, n, PAGE_SIZE, BLOCK_N)
        latent = tl.load(entries + d[None, :], mask=used[:, None], other=0.0).to(q_latent.dtype)
        rope = tl.load(entries + (RANK + r)[None, :], mask=used[:, None] & (r < ROPE)[None, :], other=0.0)
        rope = rope.to(q_latent.dtype)
        s = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(rope), s, input_precision=PRECISION)
        seen = used[None, :]
        if MASKED:
            seen = seen & (keys[None, :] <= position[:, None])
        s = tl.where(seen, s * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = _finite(new_top)
        p = tl.exp2(s - base[:, None])
        old = tl.exp2(top - base)
        total = total * old + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * old[:, None], input_precision=PRECISION)
        top = new_top

    if SCALED:
        acc *= value_scale
    splits = split >> 16
    if splits == 1:
        out += first_token.to(tl.int64) * (HEADS * RANK)
        lse += first_token.to(tl.int64) * HEADS
        _store(out, lse, acc, top, total, lse, heads, token * HEADS + heads, valid, RANK, RANK, False, LSE)
    else:
        local = tl.arange(0, BLOCK_M)
        first = slot.to(tl.int64) * (TILES * ROWS) + tile * ROWS
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        kept = valid & (local < ROWS)
        own = (partial_out + first * RANK) + (local[:, None] * RANK + d[None, :])
        tl.store(own, acc, mask=kept[:, None])
        tl.store(partial_lse + first + local, top + tl.log2(total), mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    out, lse, work, partial_out, partial_lse, tokens,
    HEADS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Merges the splits of each row and tile, in the order of the keys. Grid: that of :func:`mla_kernel`.

    The programs of a row's splits share its pairs among them, ``BLOCK_R`` at a time; ``ROWS`` is a multiple of that.
    """
    program = tl.program_id(0)
    item = program // TILES
    tile = program % TILES
    work += item * FIELDS
    q_len = tl.load(work + 2)
    split = tl.load(work + 7)
    splits = split >> 16
    if splits < 2:
        return
    index = split & 0xFFFF
    first_token = tl.load(work + 1)
    stride = TILES * ROWS
    first = (tl.load(work + 6) - index).to(tl.int64) * stride + tile * ROWS
    partial_out += first * RANK
    partial_lse += first
    out += first_token.to(tl.int64) * (HEADS * RANK)
    lse += first_token.to(tl.int64) * HEADS
    for start in tl.range(index * BLOCK_R, ROWS, splits * BLOCK_R):
        merged, top, total = _merge(
            partial_out + start * RANK, partial_lse + start, splits, stride, BLOCK_R, BLOCK_R, AT_ONCE, RANK, RANK
        )
        m = tile * BLOCK_M + start + tl.arange(0, BLOCK_R)
        token = m // HEADS
        heads = m % HEADS
        valid = (token < q_len) & (first_token + token < tokens)
        _store(out, lse, merged, top, total, lse, heads, token * HEADS + heads, valid, RANK, RANK, False, LSE)
