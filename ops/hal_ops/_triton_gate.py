"""One Triton kernel for the gates of feed-forward layers: an activation of the first half times the second half."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._row_request import RowRequest
from hal_ops._triton_rows import aligned, block_size, row_start
from hal_ops.rows import fold, half_of, refuse_grad

__all__ = ["CONFIGS", "GateConfig", "GateRows", "config_for", "gate_rows", "triton_gate"]


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How rows up to ``block`` elements are worked on: rows a program, elements of a row a program, warps."""

    block: int
    rows: int
    columns: int
    warps: int


CONFIGS = (
    GateConfig(64, 32, 64, 4),
    GateConfig(128, 16, 128, 4),
    GateConfig(256, 8, 256, 4),
    GateConfig(512, 4, 512, 4),
    GateConfig(1024, 2, 1024, 4),
    GateConfig(1 << 30, 1, 2048, 4),
)
"""For every arch: 2048 elements of the output a program, 16 a thread. The last is for all longer rows."""


def config_for(hidden: int) -> GateConfig:
    """The configuration for outputs of ``hidden`` elements a row."""
    return next(config for config in CONFIGS if hidden <= config.block)


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_short(z):
    """With erf as a polynomial, off by 1.5e-7 at most (Abramowitz and Stegun 7.1.26): less than half formats show."""
    size = tl.abs(z) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * size)
    inner = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    rest = t * (0.254829592 + t * (-0.284496736 + t * inner)) * tl.exp(-size * size)
    return 0.5 * z * tl.where(z < 0, rest, 2.0 - rest)


@triton.jit
def _gelu_tanh(z):
    # z / 2 * (1 + tanh(u)) is z * sigmoid(2 u), with u = sqrt(2 / pi) * (z + 0.044715 * z**3)
    return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))


@triton.jit(do_not_specialize=["rows", "x_inner", "out_inner"])
def gate_rows(
    x, out, rows, x_inner, x_outer_stride, x_inner_stride, out_inner, out_outer_stride, out_inner_stride,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``ROWS`` by ``COLUMNS`` elements of the output a program; those of one row lie side by side."""
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = program // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < HIDDEN)
    place = x + (row_start(row, x_inner, x_outer_stride, x_inner_stride) + column)
    gate = tl.load(place, inside, 0.0).to(tl.float32)
    up = tl.load(place + HIDDEN, inside, 0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = _silu(gate)
    elif ACTIVATION == "gelu":
        gate = _gelu(gate) if x.dtype.element_ty == tl.float32 else _gelu_short(gate)
    else:
        gate = _gelu_tanh(gate)
    place = out + (row_start(row, out_inner, out_outer_stride, out_inner_stride) + column)
    tl.store(place, (gate * up).to(out.dtype.element_ty), inside)


class GateRows:
    """The kernel for outputs of ``hidden`` elements a row on one device. ``config`` replaces the table's."""

    def __init__(self, device: object, hidden: int, activation: str, *, config: GateConfig | None = None) -> None:
        config = config or config_for(hidden)
        columns = min(config.columns, block_size(hidden))
        constants = {"HIDDEN": hidden, "ROWS": config.rows, "COLUMNS": columns, "ACTIVATION": activation}
        self._launch = Launch(gate_rows, lambda key: constants, gpu_of(device).device, num_warps=config.warps)
        self._rows, self._blocks = config.rows, -(-hidden // columns)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Gate the rows of ``x`` into ``out``."""
        rows, into = fold(x), fold(out, name="out")
        if rows.total:
            key = (aligned(x, out), rows[2:], into[2:])
            programs = -(-rows.total // self._rows) * self._blocks
            self._launch(programs, key, x, out, rows.total, *rows[1:], *into[1:])


def triton_gate(request: RowRequest, device: object, activation: str) -> Callable[..., Tensor]:
    """The ``call`` phase of a gate; ``activation`` is "silu", "gelu" or "gelu_tanh"."""
    gate = GateRows(device, request.hidden_size, activation)

    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if x.requires_grad:
            refuse_grad()
        if out is None:
            out = half_of(x)
        gate(x, out)
        return out

    return call
