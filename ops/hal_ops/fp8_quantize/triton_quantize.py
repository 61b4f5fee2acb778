"""The quantisation to FP8 in one Triton kernel, or two for a tensor's own scale.

What :func:`fp8_quantize` honours: ``dtype`` float32, bfloat16, float16; the four FP8 formats on every arch; scales a
tensor, token (rows up to 16384) or block (up to 16384 elements), made or given; deterministic; graph.

Formats are made from float32 by whole-number arithmetic, which every arch has. On the sm archs whose device declares
Triton's own conversion of a format (``triton_fp8_e4m3fn``, ``triton_fp8_e5m2``) that is taken instead: there it
saturates and keeps NaN (PTX ISA, ``cvt.satfinite``), and has been run against torch's on every value of float16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned, block_size, row_start
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest
from hal_ops.fp8_quantize.reference import SMALLEST_SCALE, Pair, check_scale, outputs, scales_shape
from hal_ops.rows import Rows, check_input, check_out, fold, refuse_grad

__all__ = ["FORMATS", "Fp8Format", "LARGEST", "fp8_quantize", "largest_values", "quantize_groups"]

LARGEST = 16384
"""Most elements of a group that is held in the registers of one program."""

_PARTS = 512
"""Most programs that look for a tensor's largest value; each leaves one number."""

_TILE = 4096


@dataclasses.dataclass(frozen=True)
class Fp8Format:
    """Bits of the fraction, exponent bias, largest finite value, code of NaN, and whether -0 is NaN."""

    fraction: int
    bias: int
    most: float
    nan: int
    unsigned_zero: bool
    native: str = ""
    """Capability with which Triton's own conversion is taken."""


FORMATS = {
    "float8_e4m3fn": Fp8Format(3, 7, 448.0, 0x7F, False, "triton_fp8_e4m3fn"),
    "float8_e5m2": Fp8Format(2, 15, 57344.0, 0x7F, False, "triton_fp8_e5m2"),
    "float8_e4m3fnuz": Fp8Format(3, 8, 240.0, 0x80, True),
    "float8_e5m2fnuz": Fp8Format(2, 16, 57344.0, 0x80, True),
}


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


def fp8_quantize(request: Fp8QuantizeRequest, device: object, *, native: bool | None = None) -> Callable[..., Pair]:
    """The ``call`` phase.

    Args:
        device: its ``capabilities``, where it has such, decide how formats are made. native: overrides that decision.

    Raises:
        ValueError: groups too large for one program.
    """
    dtype, fp8, empty = torch_dtype(request.dtype), torch_dtype(request.fp8_dtype), outputs(request)
    gpu = gpu_of(device)
    if native is None:
        declared = FORMATS[request.fp8_dtype].native in getattr(device, "capabilities", ())
        native = declared and gpu.arch.startswith("sm_")
    quantize = _Quantize(request, gpu.device, native)

    def call(x: Tensor, scale: Tensor | None = None, *, out: Pair | None = None) -> Pair:
        if x.requires_grad:
            refuse_grad()
        check_input("x", x, request.hidden_size, dtype)
        check_scale(request, x, scale)
        if out is None:
            out = empty(x)
        else:
            _check_outs(request, x, out, fp8)
        quantize(x, scale, *out)
        return out

    return call


def _check_outs(request: Fp8QuantizeRequest, x: Tensor, out: Pair, fp8: torch.dtype) -> None:
    check_out("out[0]", out[0], x.shape, fp8)
    shape = scales_shape(request, tuple(x.shape))
    if out[1].shape != shape or out[1].dtype != torch.float32:
        raise ValueError(f"out[1] is {out[1].dtype} {tuple(out[1].shape)}: give torch.float32 {shape}")


class _Quantize:
    """The kernels on one device."""

    def __init__(self, request: Fp8QuantizeRequest, device: torch.device, native: bool) -> None:
        tall, wide = _group(request)
        if tall * wide > LARGEST:
            raise ValueError(f"groups of {tall} x {wide}: these kernels hold groups of at most {LARGEST} elements")
        block = block_size(tall, 1) * block_size(wide)
        form, hidden = FORMATS[request.fp8_dtype], request.hidden_size
        self._one = request.granularity == "tensor"
        self._groups, self._tall, self._columns = max(_TILE // 2 // block, 1), tall, -(-hidden // wide)
        constants = {
            "HIDDEN": hidden,
            "TALL": tall,
            "WIDE": wide,
            "GROUPS": self._groups,
            "TALL_BLOCK": block_size(tall, 1),
            "BLOCK": block_size(wide),
            "ONE_SCALE": self._one,
            "GIVEN": request.static,
            "PARTS": _PARTS,
            "MOST": form.most,
            "FRACTION": form.fraction,
            "BIAS": form.bias,
            "NAN": form.nan,
            "UNSIGNED_ZERO": form.unsigned_zero,
            "NATIVE": native,
        }
        warps = min(max(self._groups * block // 1024, 2), 16)
        self._launch = Launch(quantize_groups, lambda key: constants, device, num_warps=warps)
        self._largest = _Largest(hidden, device)

    def __call__(self, x: Tensor, given: Tensor | None, values: Tensor, scales: Tensor) -> None:
        rows, into = fold(x), fold(values, name="out[0]")
        if not rows.total:
            if self._one:
                scales.fill_(SMALLEST_SCALE) if given is None else scales.copy_(given)
            return
        places = self._place(scales, "out[1]"), self._place(given, "scale")
        if given is None:
            given = self._largest(x, rows) if self._one else scales
        values = values.view(torch.uint8)
        groups = -(-rows.total // self._tall) * self._columns
        key = (aligned(x, values, scales, given), rows[2:], into[2:], places[0][1:], places[1][1:])
        self._launch(
            -(-groups // self._groups), key, x, values, scales, given, rows.total, given.numel(),
            *rows[1:], *into[1:], *places[0], *places[1],
        )  # fmt: skip

    def _place(self, scales: Tensor | None, name: str) -> tuple[int, int, int, int]:
        """Inner size, outer stride, inner stride, column stride."""
        if scales is None or self._one:
            return (1, 0, 0, 0)
        return (*fold(scales, name=name)[1:], scales.stride(-1))


def _group(request: Fp8QuantizeRequest) -> tuple[int, int]:
    """Rows and elements of a group; those of a tensor are cut at will."""
    if request.granularity == "block":
        return request.block_rows, request.block_size
    return 1, min(_TILE, block_size(request.hidden_size)) if request.granularity == "tensor" else request.hidden_size


class _Largest:
    """The largest values among the parts of a tensor, at most ``_PARTS`` of them."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self._block = min(block_size(hidden), 2 * _TILE)
        self._rows, self._columns = 2 * _TILE // self._block, -(-hidden // self._block)
        constants = {"HIDDEN": hidden, "ROWS": self._rows, "BLOCK": self._block}
        self._launch = Launch(largest_values, lambda key: constants, device, num_warps=8)

    def __call__(self, x: Tensor, rows: Rows) -> Tensor:
        tiles = -(-rows.total // self._rows) * self._columns
        parts = torch.empty(min(tiles, _PARTS), dtype=torch.float32, device=x.device)
        self._launch(parts.numel(), (aligned(x, parts), rows[2:]), x, parts, rows.total, *rows[1:])
        return parts
