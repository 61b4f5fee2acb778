"""Two Triton kernels for the normalisations of rows: RMS and layer norm, with or without the sum of a residual.

Rows lie in the registers of a program, so that each element is read and written once; or they are gone through block
by block, twice or thrice. What is read again then comes from the cache, and with fewer registers a program more
programs run at a time: for the RMS norm of 8192 x 8192 bfloat16 on an H200 that made 0.93 of a copy's bandwidth out of
0.90. Any length is padded to whole blocks by masks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned, block_size, row_start
from hal_ops.rows import Rows, fold

__all__ = ["CONFIGS", "NormConfig", "NormRows", "RMS_CONFIGS", "config_for", "norm_long_rows", "norm_rows"]


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """How rows of up to ``longest`` elements are worked on: elements a step, rows a program, warps a program.

    Rows longer than ``block`` are looped over, one a program.
    """

    longest: int
    block: int
    rows: int
    warps: int


ANY = 1 << 62
_SHORT = (
    NormConfig(64, 64, 32, 4),
    NormConfig(128, 128, 16, 4),
    NormConfig(256, 256, 8, 4),
    NormConfig(512, 512, 4, 4),
    NormConfig(1024, 1024, 2, 4),
    NormConfig(2048, 2048, 1, 4),
)
RMS_CONFIGS = (
    *_SHORT,
    NormConfig(4096, 2048, 1, 8),
    NormConfig(6144, 2048, 1, 8),
    NormConfig(8192, 4096, 1, 8),
    NormConfig(ANY, 4096, 1, 16),
)
"""Of the RMS norm alone, for every arch; measured on an H200 (sm_90), but for 6144: that avoids a half-empty step."""
CONFIGS = (
    *_SHORT,
    NormConfig(4096, 4096, 1, 8),
    NormConfig(8192, 8192, 1, 8),
    NormConfig(16384, 16384, 1, 16),
    NormConfig(ANY, 4096, 1, 16),
)
"""Where a residual is added or the mean taken off, for every arch; up to 16384 measured on an H200 (sm_90)."""


def config_for(hidden: int, *, rms_alone: bool) -> NormConfig:
    """The configuration for rows of ``hidden`` elements."""
    return next(config for config in (RMS_CONFIGS if rms_alone else CONFIGS) if hidden <= config.longest)


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "out_inner"])
def norm_rows(
    x, residual, weight, bias, out, rows, eps, weight_offset,
    x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride, residual_inner_stride,
    out_inner, out_outer_stride, out_inner_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows a program. ``ADD``: the residual takes up x first. ``CENTER``: the mean is taken off."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < HIDDEN)
    values = tl.load(x + (row_start(row, x_inner, x_outer_stride, x_inner_stride) + column), inside, 0.0)
    if ADD:
        start = row_start(row, residual_inner, residual_outer_stride, residual_inner_stride)
        place = residual + (start + column)
        total = values.to(tl.float32) + tl.load(place, inside, 0.0).to(tl.float32)
        values = total.to(values.dtype)
        tl.store(place, values, inside)
    values = values.to(tl.float32)
    if CENTER:
        mean = tl.div_rn(tl.sum(values, 1, keep_dims=True), HIDDEN * 1.0)
        values = tl.where(column < HIDDEN, values - mean, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / HIDDEN + eps)
    if WEIGHT:
        values *= tl.load(weight + column, column < HIDDEN, 0.0).to(tl.float32) + weight_offset
    if BIAS:
        values += tl.load(bias + column, column < HIDDEN, 0.0).to(tl.float32)
    place = out + (row_start(row, out_inner, out_outer_stride, out_inner_stride) + column)
    tl.store(place, values.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "out_inner"])
def norm_long_rows(
    x, residual, weight, bias, out, rows, eps, weight_offset,
    x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride, residual_inner_stride,
    out_inner, out_outer_stride, out_inner_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The same for one row a program (``ROWS`` is 1), in steps of ``BLOCK`` elements."""
    row = tl.program_id(0)
    x += row_start(row, x_inner, x_outer_stride, x_inner_stride)
    out += row_start(row, out_inner, out_outer_stride, out_inner_stride)
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        residual += row_start(row, residual_inner, residual_outer_stride, residual_inner_stride)
        for start in range(0, HIDDEN, BLOCK):
            column = start + tl.arange(0, BLOCK)
            old = tl.load(residual + column, column < HIDDEN, 0.0).to(tl.float32)
            new = tl.load(x + column, column < HIDDEN, 0.0, eviction_policy="evict_first").to(tl.float32)
            rounded = (old + new).to(residual.dtype.element_ty)
            tl.store(residual + column, rounded, column < HIDDEN)
            values = rounded.to(tl.float32)
            total += values if CENTER else values * values
        x = residual
    else:
        for start in range(0, HIDDEN, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(x + column, column < HIDDEN, 0.0, eviction_policy="evict_last").to(tl.float32)
            total += values if CENTER else values * values
    mean = 0.0
    if CENTER:
        mean = tl.div_rn(tl.sum(total, 0), HIDDEN * 1.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(x + column, column < HIDDEN, mean, eviction_policy="evict_last").to(tl.float32) - mean
            total += values * values
    scale = tl.rsqrt(tl.sum(total, 0) / HIDDEN + eps)
    for start in range(0, HIDDEN, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + column, column < HIDDEN, 0.0, eviction_policy="evict_first").to(tl.float32)
        values = (values - mean) * scale
        if WEIGHT:
            by = tl.load(weight + column, column < HIDDEN, 0.0, eviction_policy="evict_last")
            values *= by.to(tl.float32) + weight_offset
        if BIAS:
            values += tl.load(bias + column, column < HIDDEN, 0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(out + column, values.to(out.dtype.element_ty), column < HIDDEN)


class NormRows:
    """The kernel for rows of ``hidden`` elements on one device. ``config`` replaces the table's."""

    def __init__(
        self,
        device: object,
        hidden: int,
        eps: float,
        *,
        weight_offset: float = 0.0,
        add: bool = False,
        center: bool = False,
        weight: bool = True,
        bias: bool = False,
        config: NormConfig | None = None,
    ) -> None:
        config = config or config_for(hidden, rms_alone=not (add or center))
        kernel = norm_rows if hidden <= config.block else norm_long_rows
        constants: dict[str, Any] = {"HIDDEN": hidden, "BLOCK": min(config.block, block_size(hidden))}
        constants["ROWS"] = config.rows if hidden <= config.block else 1
        constants |= {"ADD": add, "CENTER": center, "WEIGHT": weight, "BIAS": bias}
        self._launch = Launch(kernel, lambda key: constants, gpu_of(device).device, num_warps=config.warps)
        self._rows, self._scalars = constants["ROWS"], (eps, weight_offset)

    def __call__(
        self, x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        """Normalise the rows of ``x`` into ``out``, after ``residual`` took up ``x``, where there is one."""
        rows, into = fold(x), fold(out, name="out")
        if not rows.total:
            return
        beside = Rows(1, 1, 0, 0) if residual is None else fold(residual, name="residual")
        residual, weight, bias = (x if y is None else y for y in (residual, weight, bias))
        key = (aligned(x, residual, weight, bias, out), rows[2:], beside[2:], into[2:])
        self._launch(
            -(-rows.total // self._rows), key, x, residual, weight, bias, out, rows.total, *self._scalars,
            *rows[1:], *beside[1:], *into[1:],
        )  # fmt: skip
