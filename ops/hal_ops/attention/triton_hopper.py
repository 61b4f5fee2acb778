"""Prefill and extend for Hopper's tensor cores, in Gluon: what :mod:`triton_common` does, with the overlap spelled out.

While the tensor cores multiply the weights of one block of keys with its values, the warps compute the softmax of the
next block's scores, whose product was issued first. Triton waits for a product before anything that uses its result and
cannot express this. Keys and values are copied to shared memory asynchronously, one block ahead, two buffers each. Groups
of warps may take turns to multiply (:mod:`hal_ops.attention._hopper_turns`), and go from tile to tile without a pause
(:mod:`hal_ops.attention._hopper_tiles`).

FP8: a prefill multiplies q and k as they are, and so does an extend over a cache in e4m3 that may round q (``ROUND_Q``: row
by row, in registers). The copying warps convert values to float16, and else the keys of a cache to the format of q.

Blocks are visited from the last to the first. Everything else is as in :mod:`triton_common`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hal_ops.attention._hopper_consume import consume
from hal_ops.attention._hopper_copy import barriers_of, pair_of_buffers, produce
from hal_ops.attention._hopper_tiles import tile_of

__all__ = ["hopper_extend", "hopper_prefill"]


@gluon.jit
def _tiles(
    total, work, q_side, k_side, v_side, out_side, scales, sinks, slopes, left, right, scale, cap, table, table_stride,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, RAGGED: gl.constexpr, UNIT: gl.constexpr,
    PAGE_SIZE: gl.constexpr, TMA: gl.constexpr, DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, LOOP: gl.constexpr,
    Q_SCALES: gl.constexpr, K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, ROUND_Q: gl.constexpr,
):  # fmt: skip
    """All tiles of this program, each of ``64 * PARTS`` rows: with ``LOOP`` several, else one."""
    TOKENS: gl.constexpr = 64 * PARTS // PACK
    if not LOOP:
        only = tile_of(0, total, work, HEADS // PACK, PACK, TOKENS, RAGGED, PAGE_SIZE > 0)
        if only[2] >= only[6]:
            return
    q_dtype: gl.constexpr = q_side[0].dtype.element_ty
    k_dtype: gl.constexpr = k_side[0].dtype.element_ty
    FORMAT: gl.constexpr = k_dtype if ROUND_Q else q_dtype
    FP8: gl.constexpr = k_dtype.primitive_bitwidth == 8
    WIDER: gl.constexpr = k_dtype != FORMAT
    gl.static_assert(REST == 0 or not ROUND_Q, "queries are rounded in one part")
    queries = pair_of_buffers(FORMAT, PARTS, 64, CUT, REST)
    keys = pair_of_buffers(FORMAT, 2, BLOCK_N, CUT, REST)
    values = pair_of_buffers(gl.float16 if FP8 else k_dtype, 2, BLOCK_N, V_CUT, V_REST)
    k_full, k_empty = barriers_of(1 if TMA or WIDER else 128, 2), barriers_of(PARTS, 2)
    v_full, v_empty = barriers_of(1 if TMA or FP8 else 128, 2), barriers_of(PARTS, 2)
    raw_keys, raw_values, raw_k_full, raw_v_full = keys, values, k_full, barriers_of(1, 1)
    if WIDER:
        gl.static_assert(REST == 0, "FP8 keys are converted in one part")
        raw_keys, raw_k_full = pair_of_buffers(k_dtype, 1, BLOCK_N, CUT, 0), barriers_of(1 if TMA else 128, 1)
    if FP8:
        gl.static_assert(V_REST == 0, "FP8 values are converted in one part")
        raw_values, raw_v_full = pair_of_buffers(k_dtype, 1, BLOCK_N, V_CUT, 0), barriers_of(1 if TMA else 128, 1)
    memory = (queries, keys, values, (k_full, k_empty, v_full, v_empty))
    mine = ((keys, raw_keys, raw_k_full, k_full, k_empty), (values, raw_values, raw_v_full, v_full, v_empty))
    given = (total, (sinks, slopes, left, right, cap), scale, work)
    copied = (total, left, right, table, table_stride, work)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (consume, (0, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM,
                           V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, not TMA, PARTS,
                           TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q)),
                (consume, (1, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM,
                           V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, not TMA, PARTS,
                           TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q)),
                (produce, (copied, k_side, v_side, mine, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM, V_DIM,
                           PAGE_SIZE, TMA, HAS_LEFT, HAS_RIGHT, LOOP)),
            ],
            [4, 4], [REGISTERS, COPY_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (0, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM,
                           V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, not TMA, PARTS,
                           TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q)),
                (consume, (1, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM,
                           V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, not TMA, PARTS,
                           TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q)),
                (consume, (2, given, q_side, out_side, scales, memory, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM,
                           V_DIM, PAGE_SIZE, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, not TMA, PARTS,
                           TURNS, SHORT, LOOP, Q_SCALES, K_SCALES, V_SCALES, ROUND_Q)),
                (produce, (copied, k_side, v_side, mine, HEADS, GROUP, PACK, TOKENS, RAGGED, UNIT, DIM, V_DIM,
                           PAGE_SIZE, TMA, HAS_LEFT, HAS_RIGHT, LOOP)),
            ],
            [4, 4, 4], [REGISTERS, REGISTERS, COPY_REGISTERS],
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "k_batch_rows", "k_head_rows", "k_head_columns", "v_batch_rows", "v_head_rows", "v_head_columns", "total",
        "batch", "q_len", "kv_len", "blocks", "section", "left", "right",
        "q_batch_units", "k_batch_units", "v_batch_units",
    ],
    do_not_specialize_on_alignment=["sinks", "slopes", "q_scale", "k_scale", "v_scale", "cu_q", "cu_k"],
)  # fmt: skip
def hopper_prefill(
    k_box, k_box_rest, k_batch_rows, k_head_rows, k_head_columns,
    v_box, v_box_rest, v_batch_rows, v_head_rows, v_head_columns, total,
    q, k, v, out, lse, sinks, slopes, q_scale, k_scale, v_scale, cu_q, cu_k,
    batch, q_len, kv_len, blocks, section, left, right, scale, cap,
    q_batch_units, q_stride, q_head_stride, k_batch_units, k_stride, k_head_stride,
    v_batch_units, v_stride, v_head_stride, out_stride, out_head_stride,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, RAGGED: gl.constexpr, UNIT: gl.constexpr,
    DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, LOOP: gl.constexpr,
    Q_SCALES: gl.constexpr, K_SCALES: gl.constexpr, V_SCALES: gl.constexpr,
):  # fmt: skip
    """The same as :func:`hal_ops.attention.triton_prefill.prefill_kernel`, of ``total`` tiles."""
    lengths = (q, q, batch, q_len, kv_len, blocks, section)
    if RAGGED:
        lengths = (cu_q, cu_k, batch, q_len, kv_len, blocks, section)
    _tiles(
        total, lengths, (q, q_batch_units, q_stride, q_head_stride),
        (k, k_box, k_box_rest, k_batch_rows, k_head_rows, k_head_columns, k_batch_units, k_stride, k_head_stride),
        (v, v_box, v_box_rest, v_batch_rows, v_head_rows, v_head_columns, v_batch_units, v_stride, v_head_stride),
        (out, out_stride, out_head_stride, lse),
        (q_scale if Q_SCALES > 0 else lse, k_scale if K_SCALES > 0 else lse, v_scale if V_SCALES > 0 else lse),
        sinks if SINKS else lse, slopes if ALIBI else lse, left, right, scale, cap, lse, 0,
        HEADS, GROUP, PACK, RAGGED, UNIT, 0, True, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PARTS, REGISTERS, COPY_REGISTERS, TURNS, SHORT, LOOP,
        Q_SCALES, K_SCALES, V_SCALES, False,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "k_page_rows", "k_head_rows", "k_head_columns", "v_page_rows", "v_head_rows", "v_head_columns", "total",
        "left", "right", "table_stride",
    ],
    do_not_specialize_on_alignment=["sinks", "slopes", "k_scale", "v_scale", "tiles", "cu_q", "kv_lens", "table"],
)  # fmt: skip
def hopper_extend(
    k_box, k_box_rest, k_page_rows, k_head_rows, k_head_columns,
    v_box, v_box_rest, v_page_rows, v_head_rows, v_head_columns, total,
    q, k, v, out, lse, sinks, slopes, k_scale, v_scale, tiles, cu_q, kv_lens, table, left, right, scale, cap,
    q_stride, q_head_stride, k_page_stride, k_stride, k_head_stride, v_page_stride, v_stride, v_head_stride,
    out_stride, out_head_stride, table_stride,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, PAGE_SIZE: gl.constexpr, TMA: gl.constexpr,
    DIM: gl.constexpr, CUT: gl.constexpr, REST: gl.constexpr,
    V_DIM: gl.constexpr, V_CUT: gl.constexpr, V_REST: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    SINKS: gl.constexpr, PLAIN: gl.constexpr, LSE: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, LOOP: gl.constexpr,
    K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, ROUND_Q: gl.constexpr,
):  # fmt: skip
    """The same as :func:`hal_ops.attention.triton_extend.extend_kernel`, of ``total`` tiles."""
    _tiles(
        total, (tiles, cu_q, kv_lens), (q, 0, q_stride, q_head_stride),
        (k, k_box, k_box_rest, k_page_rows, k_head_rows, k_head_columns, k_page_stride, k_stride, k_head_stride),
        (v, v_box, v_box_rest, v_page_rows, v_head_rows, v_head_columns, v_page_stride, v_stride, v_head_stride),
        (out, out_stride, out_head_stride, lse),
        (lse, k_scale if K_SCALES > 0 else lse, v_scale if V_SCALES > 0 else lse),
        sinks if SINKS else lse, slopes if ALIBI else lse, left, right, scale, cap, table, table_stride,
        HEADS, GROUP, PACK, True, 1, PAGE_SIZE, TMA, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PARTS, REGISTERS, COPY_REGISTERS, TURNS, SHORT, LOOP,
        0, K_SCALES, V_SCALES, ROUND_Q,
    )  # fmt: skip
