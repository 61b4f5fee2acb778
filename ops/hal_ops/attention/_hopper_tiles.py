"""The tiles of a program of the Hopper kernels. Each multiprocessor has one program, which makes tiles until none is left.

While the last rows of a tile are stored, keys and values of the next are copied already.

Tiles are listed with much work first. In every other turn programs take them in reverse order, so that in two turns all
have as much to do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hal_ops.attention._triton_place import place, place_tile

__all__ = ["tile_of"]


@gluon.jit
def tile_of(
    turn, total, work,
    TILE_HEADS: gl.constexpr, PACK: gl.constexpr, TOKENS: gl.constexpr, RAGGED: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """The tile of this program in a turn: ``row, head, token, q_start, k_start, out_start, q_len, kv_len``.

    Where there is none, ``q_len`` is not above ``token``. ``work``: what describes a prefill, or a listed step.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    number = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    index = gl.minimum(number, total - 1)
    if PAGED:
        tiles, cu_q, kv_lens = work
        row, head, token, q_start, q_len, kv_len = place_tile(index, tiles, cu_q, kv_lens, TILE_HEADS, PACK)
        k_start = q_start
        out_start = q_start
        q_len = gl.where(row < 0, token, q_len)
    else:
        cu_q, cu_k, batch, q_len, kv_len, blocks, section = work
        row, head, token, q_start, k_start, out_start, q_len, kv_len = place(
            index, cu_q, cu_k, batch, q_len, kv_len, blocks, section, TILE_HEADS, PACK, TOKENS, RAGGED
        )
    q_len = gl.where(number < total, q_len, token)
    return row, head, token, q_start, k_start, out_start, q_len, kv_len
