"""What a warp group of the Hopper kernels does with a block: products, softmax, loads and stores of its rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hal_ops.attention._hopper_copy import rows_layout
from hal_ops.attention._hopper_turns import pass_turn, wait_turn

__all__ = [
    "fetch_queries", "fold_block", "multiply_keys", "multiply_values", "pack", "product_layout", "put_queries", "rounded",
    "softmax", "store_rows", "times", "wait_values",
]  # fmt: skip

E4M3_MAX = gl.constexpr(448.0)

# Triton 3.9 calls it barrier.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def product_layout(columns, warps, dtype):
    """Of a product of two operands of ``dtype``, which has 32 bytes of each row in an instruction."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 256 // dtype.primitive_bitwidth])


@gluon.jit
def _halves(x):
    """The first and the last half of the columns; a thread has some of either."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def _row_max(x, SHORT: gl.constexpr):
    """Gluon's own is one chain through a thread's columns; ``SHORT`` takes a quarter of its length."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    if SHORT:
        low, high = _halves(x)
        low, high = _halves(gl.maximum(low, high))
        most = gl.convert_layout(gl.max(gl.maximum(low, high), 1), ROWS)
    else:
        most = gl.max(x, 1)
    return most


@gluon.jit
def _row_sum(x, SHORT: gl.constexpr):
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    if SHORT:
        low, high = _halves(x)
        total = gl.convert_layout(gl.sum(low + high, 1), ROWS)
    else:
        total = gl.sum(x, 1)
    return total


@gluon.jit
def softmax(
    s, keys, position, high, left, right, scale, cap, slope, top, total,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, PLAIN: gl.constexpr,
    MASKED: gl.constexpr, SHORT: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Weights of one block: ``p, shrink, total, top``; ``shrink`` is what earlier results are multiplied by.

    ``scale`` is a number, or one a row.
    """
    across = scale
    if BY_ROW:
        across = scale[:, None]
    if not PLAIN:
        s = s * across
        if SOFTCAP:
            s = cap - 2.0 * cap / (gl.exp2(s) + 1.0)
        if ALIBI:
            s = s - slope[:, None] * gl.abs(keys[None, :] - position[:, None]).to(gl.float32)
    if MASKED:
        seen = (keys < high)[None, :]
        if HAS_RIGHT:
            seen = seen & (keys[None, :] <= position[:, None] + right)
        if HAS_LEFT:
            seen = seen & (keys[None, :] >= position[:, None] - left)
        s = gl.where(seen, s, float("-inf"))
    if PLAIN:
        new_top = gl.maximum(top, _row_max(s, SHORT) * scale)
        p = gl.exp2(s * across - new_top[:, None])
    else:
        new_top = gl.maximum(top, _row_max(s, SHORT))
        p = gl.exp2(s - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return p, shrink, total * shrink + _row_sum(p, SHORT), new_top


@gluon.jit
def pack(p, dtype: gl.constexpr):
    """Pairs of neighbouring columns as one int32: a loop carries them in half as many registers."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    low, high = gl.split(gl.reshape(p, [M, N // 2, 2]))
    if dtype == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    return packed


@gluon.jit
def _unpack(packed, dtype: gl.constexpr):
    M: gl.constexpr = packed.shape[0]
    N: gl.constexpr = packed.shape[1] * 2
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    pairs = gl.join(low, high)
    return gl.reshape(pairs, [M, N]).to(dtype, bitcast=True)


@gluon.jit
def multiply_keys(queries, keys, slot, SPLIT: gl.constexpr):
    """Issues q k^T of one buffer."""
    q, q_rest = queries
    k, k_rest = keys
    BLOCK_M: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = k.shape[1]
    none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N, 4, q.dtype))
    s = hopper.warpgroup_mma(q, k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    if SPLIT:
        s = hopper.warpgroup_mma(q_rest, k_rest.index(slot).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def multiply_values(p, acc, rest, values, slot, SPLIT: gl.constexpr):
    """Issues p v of one buffer."""
    v, v_rest = values
    LAYOUT: gl.constexpr = product_layout(v.shape[2], 4, v.dtype)
    p = _unpack(p, v.dtype)
    weights = gl.convert_layout(p, gl.DotOperandLayout(0, LAYOUT, 2))
    acc = hopper.warpgroup_mma(weights, v.index(slot), acc, is_async=True)
    if SPLIT:
        REST_LAYOUT: gl.constexpr = product_layout(v_rest.shape[2], 4, v.dtype)
        weights_rest = gl.convert_layout(p, gl.DotOperandLayout(0, REST_LAYOUT, 2))
        rest = hopper.warpgroup_mma(weights_rest, v_rest.index(slot), rest, is_async=True)
    return acc, rest


@gluon.jit
def wait_values(acc, rest, SPLIT: gl.constexpr, LATER: gl.constexpr):
    """Waits for all products but the last ``LATER`` that were issued."""
    if SPLIT:
        acc, rest = hopper.warpgroup_mma_wait(LATER, deps=(acc, rest))
    else:
        acc = hopper.warpgroup_mma_wait(LATER, deps=(acc,))
    return acc, rest


@gluon.jit
def times(x, factor):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.convert_layout(factor, LAYOUT)[:, None]


@gluon.jit
def _fetch_part(base, offsets, valid, buffer, DIM: gl.constexpr, FIRST: gl.constexpr):
    BLOCK: gl.constexpr = buffer.shape[2]
    LAYOUT: gl.constexpr = rows_layout(BLOCK, 4, buffer.dtype)
    rows = gl.convert_layout(offsets, gl.SliceLayout(1, LAYOUT))
    inside = gl.convert_layout(valid, gl.SliceLayout(1, LAYOUT))
    columns = FIRST + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(
        base + (rows[:, None] + columns[None, :]), mask=inside[:, None] & (columns < DIM)[None, :], other=0.0
    )


@gluon.jit
def fetch_queries(base, offsets, valid, buffers, DIM: gl.constexpr):
    """Rows of queries in registers, in two parts like ``buffers``; 0 where there are none."""
    whole, rest = buffers
    x = _fetch_part(base, offsets, valid, whole, DIM, 0)
    x_rest = x
    if whole.shape[2] < DIM:
        x_rest = _fetch_part(base, offsets, valid, rest, DIM, whole.shape[2])
    return x, x_rest


@gluon.jit
def rounded(fetched, rows):
    """Rows that were fetched, in e4m3, whose range each fills; and what they are to be multiplied by, laid out as ``rows``.
    A row's numbers depend on nothing but itself, whatever else its tile holds."""
    LAYOUT: gl.constexpr = rows.type.layout
    x = fetched[0].to(gl.float32)
    most = gl.maximum(gl.max(gl.abs(x), 1), 1e-30)
    x = (x * (E4M3_MAX / most)[:, None]).to(gl.float8e4nv)
    return (x, x), gl.convert_layout(most / E4M3_MAX, LAYOUT)


@gluon.jit
def put_queries(fetched, buffers, slot, DIM: gl.constexpr):
    """Rows that were fetched into the buffers of a slot, which nobody else reads. Returns these buffers."""
    whole, rest = buffers
    x, x_rest = fetched
    whole.index(slot).store(x)
    if whole.shape[2] < DIM:
        rest.index(slot).store(x_rest)
    hopper.fence_async_shared()
    _barrier()
    return whole.index(slot), rest.index(slot)


@gluon.jit
def store_rows(base, offsets, valid, x, DIM: gl.constexpr, BLOCK: gl.constexpr, FIRST: gl.constexpr):
    LAYOUT: gl.constexpr = rows_layout(BLOCK, 4, base.dtype.element_ty)
    x = gl.convert_layout(x.to(base.dtype.element_ty), LAYOUT)
    rows = gl.convert_layout(offsets, gl.SliceLayout(1, LAYOUT))
    inside = gl.convert_layout(valid, gl.SliceLayout(1, LAYOUT))
    columns = FIRST + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(base + (rows[:, None] + columns[None, :]), x, mask=inside[:, None] & (columns < DIM)[None, :])


@gluon.jit
def fold_block(
    n, start, p, acc, rest, total, top, queries, keys, values, barriers, high,
    position, left, right, scale, cap, slope, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, PLAIN: gl.constexpr, MASKED: gl.constexpr,
    SPLIT: gl.constexpr, V_SPLIT: gl.constexpr, FENCE: gl.constexpr,
    part: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr, SHORT: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """The kernel's block ``n``: multiplies the weights of the one before with its values, and makes those of this one."""
    k_full, k_empty, v_full, v_empty = barriers
    BLOCK_N: gl.constexpr = keys[0].shape[1]
    last = n - 1
    mbarrier.wait(k_full.index(n & 1), (n >> 1) & 1)
    if FENCE:
        hopper.fence_async_shared()
    wait_turn(part, TURNS)
    s = multiply_keys(queries, keys, n & 1, SPLIT)
    acc, rest = multiply_values(p, acc, rest, values, last & 1, V_SPLIT)
    pass_turn(part, PARTS, TURNS)
    s = hopper.warpgroup_mma_wait(2 if V_SPLIT else 1, deps=(s,))
    mbarrier.arrive(k_empty.index(n & 1))
    columns = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
    p, shrink, total, top = softmax(
        s, columns, position, high, left, right, scale, cap, slope, top, total,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, PLAIN, MASKED, SHORT, BY_ROW,
    )  # fmt: skip
    # ptxas moves the wait for a product up to where the last one was issued, across any arithmetic, but not across a
    # branch; the one in this wait keeps the softmax beside the product.
    mbarrier.wait(v_full.index(n & 1), (n >> 1) & 1)
    acc, rest = wait_values(acc, rest, V_SPLIT, 0)
    mbarrier.arrive(v_empty.index(last & 1))
    p = pack(p, values[0].dtype)
    acc = times(acc, shrink)
    if V_SPLIT:
        rest = times(rest, shrink)
    return p, acc, rest, total, top
