"""The order of a tile's groups of warps: each issues its products in its turn, so that they do not wait side by side.

Without turns the tensor cores work at the products of all groups at once, which end together; then all groups compute
softmaxes and the tensor cores have nothing to do. In turns one group's softmax runs beside the products of the others.

A turn is passed on by an mbarrier a group (``TURNS`` 1), or by one of the named barriers that Triton leaves alone (2; 3 if
it is passed on already after the product with the keys).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["make_turns", "pass_turn", "start_turns", "wait_turn"]

_FIRST_NAMED = 10
"""Of 16. Triton takes barrier 0, one to switch partitions and one for each of them: 5 of the kernels here."""


@gluon.constexpr_function
def _named(instruction, group):
    return f"{instruction} {_FIRST_NAMED + group}, 256; mov.b32 $0, $1;"


@gluon.jit
def _named_barrier(instruction: gl.constexpr, group: gl.constexpr):
    """``bar.sync`` or ``bar.arrive`` of a group's barrier, which two groups of 128 threads meet at."""
    gl.inline_asm_elementwise(
        _named(instruction, group), "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def make_turns(PARTS: gl.constexpr, TURNS: gl.constexpr):
    """The barriers of all groups; a single one, that nobody waits for, where there are no such turns."""
    COUNT: gl.constexpr = PARTS if TURNS == 1 else 1
    turns = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(COUNT):
        mbarrier.init(turns.index(group), count=1)
    return turns


@gluon.jit
def start_turns(part: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr):
    """Group 0 has the first turn; the last group gives it to it, as it does later."""
    if TURNS >= 2 and part == PARTS - 1:
        _named_barrier("bar.arrive", 0)


@gluon.jit
def wait_turn(turns, turn, part: gl.constexpr, TURNS: gl.constexpr):
    """Waits for this group's ``turn``, counted from 0."""
    if TURNS == 1:
        # Of group 0 one turn fewer has been passed on: its first is nobody's gift.
        mbarrier.wait(turns.index(part), (turn & 1) ^ (1 if part == 0 else 0))
    if TURNS >= 2:
        _named_barrier("bar.sync", part)


@gluon.jit
def pass_turn(turns, part: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr):
    """Gives the turn to the next group."""
    NEXT: gl.constexpr = (part + 1) % PARTS
    if TURNS == 1:
        mbarrier.arrive(turns.index(NEXT))
    if TURNS >= 2:
        _named_barrier("bar.arrive", NEXT)
