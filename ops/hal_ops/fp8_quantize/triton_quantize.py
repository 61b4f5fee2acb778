"""The quantisation to FP8 in one Triton kernel, or two for a tensor's own scale.

What :func:`fp8_quantize` honours: ``dtype`` float32, bfloat16, float16; the four FP8 formats on every arch; scales a
tensor, token or block, made or given; deterministic; graph. Tokens and blocks of more than 16384 elements are gone
through twice.

Formats are made from float32 by whole-number arithmetic, which every arch has. On the sm archs whose device declares
Triton's own conversion of a format (``triton_fp8_e4m3fn``, ``triton_fp8_e5m2``) that is taken instead: there it
saturates and keeps NaN (PTX ISA, ``cvt.satfinite``), and has been run against torch's on every value of float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned, block_size
from hal_ops.fp8_quantize._triton_quantize_kernels import largest_values, quantize_groups, quantize_long_groups
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest
from hal_ops.fp8_quantize.reference import SMALLEST_SCALE, Pair, outputs
from hal_ops.rows import Rows, fold, refuse_grad

__all__ = [
    "FORMATS",
    "Fp8Format",
    "LARGEST",
    "fp8_quantize",
    "largest_values",
    "quantize_groups",
    "quantize_long_groups",
]

LARGEST = 16384
"""Most elements of a group, its sides rounded up to powers of two, that is held in the registers of one program."""

_PARTS = 512
"""Most programs that look for a tensor's largest value; each leaves one number."""

_TILE = 4096
_LONG_WARPS = 16
"""Those with which the norms go through rows of such lengths."""


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


def fp8_quantize(request: Fp8QuantizeRequest, device: object, *, native: bool | None = None) -> Callable[..., Pair]:
    """The ``call`` phase.

    Args:
        device: its ``capabilities``, where it has such, decide how formats are made. native: overrides that decision.
    """
    gpu, empty = gpu_of(device), outputs(request)
    if native is None:
        declared = FORMATS[request.fp8_dtype].native in getattr(device, "capabilities", ())
        native = declared and gpu.arch.startswith("sm_")
    quantize = _Quantize(request, gpu.device, native)

    def call(x: Tensor, scale: Tensor | None = None, *, out: Pair | None = None) -> Pair:
        if x.requires_grad:
            refuse_grad()
        if out is None:
            out = empty(x)
        quantize(x, scale, *out)
        return out

    return call


class _Quantize:
    """The kernels on one device."""

    def __init__(self, request: Fp8QuantizeRequest, device: torch.device, native: bool) -> None:
        tall, wide = _group(request)
        block = block_size(tall, 1) * block_size(wide)
        self._one, self._long = request.granularity == "tensor", block > LARGEST
        self._groups = 1 if self._long else max(_TILE // 2 // block, 1)
        self._tall, self._columns = tall, -(-request.hidden_size // wide)
        sizes = {"HIDDEN": request.hidden_size, "TALL": tall, "WIDE": wide}
        if self._long:
            kernel, warps = quantize_long_groups, _LONG_WARPS
            constants = {**sizes, "STEP": _TILE, "GIVEN": request.static, **_format(request, native)}
        else:
            kernel, warps = quantize_groups, min(max(self._groups * block // 1024, 2), 16)
            sizes |= {"GROUPS": self._groups, "TALL_BLOCK": block_size(tall, 1), "BLOCK": block_size(wide)}
            scales = {"ONE_SCALE": self._one, "GIVEN": request.static, "PARTS": _PARTS}
            constants = {**sizes, **scales, **_format(request, native)}
        self._launch = Launch(kernel, lambda key: constants, device, num_warps=warps)
        self._largest = _Largest(request.hidden_size, device)

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
        counts = (rows.total,) if self._long else (rows.total, given.numel())
        self._launch(
            -(-groups // self._groups), key, x, values, scales, given, *counts,
            *rows[1:], *into[1:], *places[0], *places[1],
        )  # fmt: skip

    def _place(self, scales: Tensor | None, name: str) -> tuple[int, int, int, int]:
        """Inner size, outer stride, inner stride, column stride."""
        if scales is None or self._one:
            return (1, 0, 0, 0)
        return (*fold(scales, name=name)[1:], scales.stride(-1))


def _format(request: Fp8QuantizeRequest, native: bool) -> dict[str, Any]:
    form = FORMATS[request.fp8_dtype]
    about = {"MOST": form.most, "FRACTION": form.fraction, "BIAS": form.bias, "NAN": form.nan}
    return {**about, "UNSIGNED_ZERO": form.unsigned_zero, "NATIVE": native}


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
