"""Where a tile of queries lies, and which blocks of keys it sees. Scalars alone: Gluon calls these too."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["key_blocks", "place", "place_tile"]


@triton.jit
def _sequence_of(block, cu_seqlens, batch, TOKENS: tl.constexpr):
    """The sequence of a block of queries; sequence r has the blocks from ``cu_seqlens[r] // TOKENS + r`` on."""
    low = block * 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(cu_seqlens + middle) // TOKENS + middle > block
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle)
    return low


@triton.jit
def place(
    index, cu_q, cu_k, batch, q_len, kv_len, blocks, section,
    TILE_HEADS: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tile ``index`` of a prefill: ``row, head, token, q_start, k_start, out_start, q_len, kv_len``.

    Late queries, which see most keys, go first. ``section`` pairs of sequence and head run side by side, so that their
    keys stay in the cache. Dense: ``blocks`` tiles a pair. Ragged: ``blocks`` for all sequences, an upper bound; those
    that are too many get a token past their sequence.
    """
    pairs = TILE_HEADS if RAGGED else batch * TILE_HEADS
    before = index // (section * blocks) * section
    index -= before * blocks
    width = tl.minimum(section, pairs - before)
    block = blocks - 1 - index // width
    pair = before + index % width
    head = pair % TILE_HEADS * PACK
    row = pair // TILE_HEADS
    q_start = row * 0
    k_start = q_start
    out_start = row * q_len
    if RAGGED:
        sequence = _sequence_of(block, cu_q, batch, TOKENS)
        q_start = tl.load(cu_q + sequence)
        q_len = tl.load(cu_q + sequence + 1) - q_start
        k_start = tl.load(cu_k + sequence)
        kv_len = tl.load(cu_k + sequence + 1) - k_start
        block -= q_start // TOKENS + sequence
        out_start = q_start
    return row, head, block * TOKENS, q_start, k_start, out_start, q_len, kv_len


@triton.jit
def place_tile(index, tiles, cu_q, kv_lens, TILE_HEADS: tl.constexpr, PACK: tl.constexpr):
    """Tile ``index`` of a listed step: ``row, head, token, q_start, q_len, kv_len``; row -1 is none."""
    tiles += index // TILE_HEADS * 2
    row = tl.load(tiles)
    token = tl.load(tiles + 1)
    known = tl.maximum(row, 0)
    q_start = tl.load(cu_q + known)
    q_len = tl.load(cu_q + known + 1) - q_start
    return row, index % TILE_HEADS * PACK, token, q_start, q_len, tl.load(kv_lens + known)


@triton.jit
def key_blocks(
    first, last, kv_len, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of queries at positions ``first`` to ``last``: keys ``[low, high)`` that any sees, and their blocks.

    Returns ``low, high, begin, whole, ragged, end``: blocks ``[whole, ragged)`` are seen by all rows, those from
    ``begin`` to ``end`` on either side of them by some.
    """
    low = 0
    high = kv_len
    all_low = 0
    all_high = kv_len
    if HAS_LEFT:
        low = tl.maximum(first - left, 0)
        all_low = tl.maximum(last - left, 0)
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(last + right + 1, kv_len), 0)
        all_high = tl.maximum(tl.minimum(first + right + 1, kv_len), 0)
    high = tl.maximum(high, low)
    begin = low // BLOCK_N
    end = tl.maximum(tl.cdiv(high, BLOCK_N), begin)
    whole = tl.minimum(tl.cdiv(all_low, BLOCK_N), end)
    ragged = tl.maximum(tl.minimum(all_high // BLOCK_N, end), whole)
    return low, high, begin, whole, ragged, end
