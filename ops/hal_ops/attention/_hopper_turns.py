"""The order of a tile's groups of warps: each issues its products in its turn, so that they do not wait side by side.

Without turns the tensor cores work at the products of all groups at once, which end together; then all groups compute
softmaxes and the tensor cores have nothing to do. In turns one group's softmax runs beside the products of the others.

A turn is passed on by named barriers that Triton leaves alone. mbarriers do that too, but Triton has all warps of a group
meet before it arrives at one: on an H200 a prefill was slower so than without turns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["pass_turn", "start_turns", "wait_turn"]

_FIRST_NAMED = 10
"""Of 16. Triton takes barrier 0, one to switch partitions and one for each of them: 5 of the kernels here."""


@gluon.constexpr_function
def _assembly(instruction, group):
    return f"{instruction} {_FIRST_NAMED + group}, 256; mov.b32 $0, $1;"


@gluon.jit
def _barrier(instruction: gl.constexpr, group: gl.constexpr):
    """``bar.sync`` or ``bar.arrive`` at a group's barrier, for its 128 threads and those of the group before it."""
    gl.inline_asm_elementwise(
        _assembly(instruction, group), "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start_turns(part: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr):
    """Group 0 has the first turn: the last group gives it, as it does later."""
    if TURNS and part == PARTS - 1:
        _barrier("bar.arrive", 0)


@gluon.jit
def wait_turn(part: gl.constexpr, TURNS: gl.constexpr):
    if TURNS:
        _barrier("bar.sync", part)


@gluon.jit
def pass_turn(part: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr):
    """Gives the turn to the next group. The last turn is given to nobody: a barrier may be left so at the end."""
    if TURNS:
        _barrier("bar.arrive", (part + 1) % PARTS)
