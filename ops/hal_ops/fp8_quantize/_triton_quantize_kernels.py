"""The device code of :mod:`hal_ops.fp8_quantize.triton_quantize`: a tensor's largest value, groups held in registers, and
groups gone through twice."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hal_ops._triton_rows import row_start

__all__ = ["largest_values", "quantize_groups", "quantize_long_groups"]


@triton.jit
def _to_fp8(
    x, MOST: tl.constexpr, FRACTION: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    UNSIGNED_ZERO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """float32 to the bits of an FP8 format: to nearest even, at most the largest finite value, NaN kept."""
    if NATIVE:  # the conversion saturates, infinities too, and keeps NaN
        if FRACTION == 3:
            code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        size = tl.minimum(tl.abs(x), MOST)
        drop: tl.constexpr = 23 - FRACTION
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop) - ((127 - BIAS) << FRACTION)
        # below the smallest normal value, adding a number whose last place is the format's smallest step rounds to it
        rounder: tl.constexpr = (127 + 1 - BIAS - FRACTION + 23) << 23
        shifted = size + tl.full((1, 1), rounder, tl.int32).to(tl.float32, bitcast=True)
        small = shifted.to(tl.int32, bitcast=True) - rounder
        code = tl.where(bits < ((127 + 1 - BIAS) << 23), small, normal)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        if UNSIGNED_ZERO:
            sign = tl.where(code == 0, 0, sign)
        code = tl.where(x != x, NAN, code | sign).to(tl.uint8)
    return code


@triton.jit
def _known_size(x):
    """The absolute values, with 0 for infinities and NaN."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _scale_of(largest, MOST: tl.constexpr):
    return tl.maximum(largest / MOST, 1.1754943508222875e-38)


@triton.jit(do_not_specialize=["rows", "inner"])
def largest_values(
    x, parts, rows, inner, outer_stride, inner_stride,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest finite size among every so manyth tile of rows: one number a program."""
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    columns: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    tiles = tl.cdiv(rows, ROWS) * columns
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // columns) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % columns) * BLOCK + tl.arange(0, BLOCK)[None, :]
        place = x + (row_start(row, inner, outer_stride, inner_stride) + column)
        values = tl.load(place, (row < rows) & (column < HIDDEN), 0.0).to(tl.float32)
        largest = tl.maximum(largest, _known_size(values))
    tl.store(parts + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit(do_not_specialize=["rows", "num_parts", "x_inner", "values_inner", "scales_inner", "given_inner"])
def quantize_groups(
    x, values, scales, given, rows, num_parts, x_inner, x_outer_stride, x_inner_stride,
    values_inner, values_outer_stride, values_inner_stride,
    scales_inner, scales_outer_stride, scales_inner_stride, scales_column_stride,
    given_inner, given_outer_stride, given_inner_stride, given_column_stride,
    HIDDEN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
    TALL_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ONE_SCALE: tl.constexpr, GIVEN: tl.constexpr, PARTS: tl.constexpr,
    MOST: tl.constexpr, FRACTION: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    UNSIGNED_ZERO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """``GROUPS`` groups of ``TALL`` rows by ``WIDE`` elements a program.

    ``ONE_SCALE``: all groups share a scale, ``given``, or what the ``num_parts`` numbers in ``given`` make. Else a
    group's scale is ``given``, or made here. ``TALL_BLOCK`` and ``BLOCK`` are ``TALL`` and ``WIDE`` rounded up.
    """
    columns: tl.constexpr = (HIDDEN + WIDE - 1) // WIDE
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    tall_row = group // columns
    wide_column = group - tall_row * columns
    element = tl.arange(0, TALL_BLOCK * BLOCK)[None, :]
    if TALL == 1:
        row = tall_row
        offset = element
    else:
        row = tall_row * TALL + element // BLOCK
        offset = element % BLOCK
    column = wide_column * WIDE + offset
    inside = (row < rows) & (column < HIDDEN)
    if BLOCK != WIDE:
        inside = inside & (offset < WIDE)
    if TALL_BLOCK != TALL:
        inside = inside & (element // BLOCK < TALL)
    place = x + (row_start(row, x_inner, x_outer_stride, x_inner_stride) + column)
    x_values = tl.load(place, inside, 0.0).to(tl.float32)
    there = tall_row * TALL < rows
    if ONE_SCALE:
        if GIVEN:
            scale = tl.load(given)
        else:
            part = tl.arange(0, PARTS)
            scale = _scale_of(tl.max(tl.load(given + part, part < num_parts, 0.0), 0), MOST)
        if tl.program_id(0) == 0:
            tl.store(scales, scale)
    else:
        if GIVEN:
            start = row_start(tall_row, given_inner, given_outer_stride, given_inner_stride)
            scale = tl.load(given + (start + wide_column * given_column_stride), there, 1.0)
        else:
            scale = _scale_of(tl.max(_known_size(x_values), 1, keep_dims=True), MOST)
        start = row_start(tall_row, scales_inner, scales_outer_stride, scales_inner_stride)
        tl.store(scales + (start + wide_column * scales_column_stride), scale, there)
    code = _to_fp8(x_values * (1.0 / scale), MOST, FRACTION, BIAS, NAN, UNSIGNED_ZERO, NATIVE)
    place = values + (row_start(row, values_inner, values_outer_stride, values_inner_stride) + column)
    tl.store(place, code, inside)


@triton.jit
def _in_group(
    first, tall_row, wide_column, rows,
    HIDDEN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Row (one, where ``TALL`` is 1), column and existence of the elements of a group from ``first`` on: ``[1, STEP]``."""
    element = first + tl.arange(0, STEP)[None, :]
    if TALL == 1:
        row = tall_row
        column = wide_column * WIDE + element
        inside = (element < WIDE) & (column < HIDDEN)
    else:
        row = tall_row * TALL + element // WIDE
        column = wide_column * WIDE + element % WIDE
        inside = (element < TALL * WIDE) & (row < rows) & (column < HIDDEN)
    return row, column, inside


@triton.jit(do_not_specialize=["rows", "x_inner", "values_inner", "scales_inner", "given_inner"])
def quantize_long_groups(
    x, values, scales, given, rows, x_inner, x_outer_stride, x_inner_stride,
    values_inner, values_outer_stride, values_inner_stride,
    scales_inner, scales_outer_stride, scales_inner_stride, scales_column_stride,
    given_inner, given_outer_stride, given_inner_stride, given_column_stride,
    HIDDEN: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, GIVEN: tl.constexpr,
    MOST: tl.constexpr, FRACTION: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    UNSIGNED_ZERO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The same for one group a program, with a scale of its own, in steps of ``STEP`` elements.

    They are read twice where the scale is made; the second time they come from the cache.
    """
    columns: tl.constexpr = (HIDDEN + WIDE - 1) // WIDE
    tall_row = tl.program_id(0) // columns
    wide_column = tl.program_id(0) - tall_row * columns
    if GIVEN:
        start = row_start(tall_row, given_inner, given_outer_stride, given_inner_stride)
        scale = tl.load(given + (start + wide_column * given_column_stride))
    else:
        largest = tl.zeros((1, STEP), tl.float32)
        for first in range(0, TALL * WIDE, STEP):
            row, column, inside = _in_group(first, tall_row, wide_column, rows, HIDDEN, TALL, WIDE, STEP)
            place = x + (row_start(row, x_inner, x_outer_stride, x_inner_stride) + column)
            x_values = tl.load(place, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
            largest = tl.maximum(largest, _known_size(x_values))
        scale = _scale_of(tl.max(tl.max(largest, 1), 0), MOST)
    start = row_start(tall_row, scales_inner, scales_outer_stride, scales_inner_stride)
    tl.store(scales + (start + wide_column * scales_column_stride), scale)
    for first in range(0, TALL * WIDE, STEP):
        row, column, inside = _in_group(first, tall_row, wide_column, rows, HIDDEN, TALL, WIDE, STEP)
        place = x + (row_start(row, x_inner, x_outer_stride, x_inner_stride) + column)
        x_values = tl.load(place, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        code = _to_fp8(x_values * (1.0 / scale), MOST, FRACTION, BIAS, NAN, UNSIGNED_ZERO, NATIVE)
        place = values + (row_start(row, values_inner, values_outer_stride, values_inner_stride) + column)
        tl.store(place, code, inside)
