"""Variants of the kernels of the ops beside attention: every configuration, in the formats that models use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hal_triton_tests_aot import Variant

from hal_ops._triton_gate import CONFIGS as GATE_CONFIGS
from hal_ops._triton_norm import CONFIGS as NORM_CONFIGS
from hal_ops._triton_norm import RMS_CONFIGS
from hal_ops.fp8_quantize.triton_quantize import FORMATS
from hal_ops.rotary_embedding.triton_rotary import CONFIGS as ROTARY_CONFIGS

NORM = "hal_ops._triton_norm:norm_rows"
LONG = "hal_ops._triton_norm:norm_long_rows"
GATE = "hal_ops._triton_gate:gate_rows"
ROTARY = "hal_ops.rotary_embedding.triton_rotary:rotate_heads"
QUANTIZE_LONG = "hal_ops.fp8_quantize.triton_quantize:quantize_long_groups"
QUANTIZE = "hal_ops.fp8_quantize.triton_quantize:quantize_groups"
LARGEST = "hal_ops.fp8_quantize.triton_quantize:largest_values"


def variants() -> Iterator[Variant]:
    yield from _norms()
    yield from _gates()
    yield from _rotaries()
    yield from _quantizations()


def _places(*names: str, kinds: tuple[str, ...] = ("inner", "outer_stride", "inner_stride")) -> list[str]:
    return [f"{name}_{kind}".lstrip("_") for name in names for kind in kinds]


def _variant(
    kernel: str, label: str, pointers: Mapping[str, str], numbers: list[str], constants: Mapping[str, Any], warps: int,
    **more: Any,
) -> Variant:  # fmt: skip
    """``numbers`` are the arguments that are 32-bit whole numbers, the strides among them multiples of 16."""
    strides = tuple(name for name in numbers if name.endswith("stride"))
    extra = more.pop("floats", ())
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(extra, "fp32")}
    options = {"num_warps": warps}
    return Variant(kernel, label, signature, constants, (*pointers, *strides), options, **more)


def _norms() -> Iterator[Variant]:
    kinds = {
        "rms_norm": {"ADD": False, "CENTER": False, "WEIGHT": True, "BIAS": False},
        "fused_add_rms_norm": {"ADD": True, "CENTER": False, "WEIGHT": True, "BIAS": False},
        "layer_norm": {"ADD": False, "CENTER": True, "WEIGHT": True, "BIAS": True},
    }
    numbers = ["rows", *_places("x", "residual", "out")]
    pointers = dict.fromkeys(("x", "residual", "weight", "bias", "out"), "*bf16")
    for kind, flags in kinds.items():
        for config in RMS_CONFIGS if kind == "rms_norm" else (NORM_CONFIGS[1], *NORM_CONFIGS[-4:]):
            hidden = min(config.longest, 32768)
            constants = {"HIDDEN": hidden, "BLOCK": config.block, "ROWS": config.rows, **flags}
            kernel = NORM if hidden <= config.block else LONG
            yield _variant(
                kernel, f"{kind} {hidden}", pointers, numbers, constants, config.warps,
                floats=("eps", "weight_offset"),
            )  # fmt: skip


def _gates() -> Iterator[Variant]:
    numbers, pointers = ["rows", *_places("x", "out")], dict.fromkeys(("x", "out"), "*bf16")
    for config in GATE_CONFIGS:
        for activation in ("silu", "gelu", "gelu_tanh") if config.block > 1024 else ("silu",):
            constants = {"HIDDEN": min(config.block, 11008), "ROWS": config.rows, "COLUMNS": config.columns}
            label = f"{activation} {constants['HIDDEN']}"
            yield _variant(GATE, label, pointers, numbers, {**constants, "ACTIVATION": activation}, config.warps)


def _rotaries() -> Iterator[Variant]:
    kinds = ("inner", "outer_stride", "inner_stride", "head_stride")
    numbers = ["max_position", "cos_stride", "sin_stride", *_places("q", "k", "q_out", "k_out", kinds=kinds)]
    tables = {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
    pointers = {**dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16"), **tables}
    for style, config in ROTARY_CONFIGS.items():
        for dim in (128, 64):
            constants = {"Q_HEADS": 32, "K_HEADS": 8, "HEAD_DIM": 128, "ROTARY_DIM": dim, "NEOX": style == "neox"}
            constants |= {"HEADS": config.elements // dim, "HALF": dim // 2, "REST": 64, "COPY": dim < 128}
            yield _variant(ROTARY, f"{style} {dim} of 128", pointers, numbers, constants, config.warps)


def _quantizations() -> Iterator[Variant]:
    kinds = ("inner", "outer_stride", "inner_stride", "column_stride")
    numbers = ["rows", "num_parts", *_places("x", "values"), *_places("scales", "given", kinds=kinds)]
    pointers = {"x": "*bf16", "values": "*u8", "scales": "*fp32", "given": "*fp32"}
    shapes = {"token 8192": (1, 8192, 1, 8), "block 1x128": (1, 128, 16, 2), "block 128x128": (128, 128, 1, 16)}
    for shape, (tall, wide, groups, warps) in shapes.items():
        for name in FORMATS if shape == "token 8192" else ("float8_e4m3fn",):
            sizes = {"HIDDEN": 8192, "TALL": tall, "WIDE": wide, "GROUPS": groups, "TALL_BLOCK": tall, "BLOCK": wide}
            constants = {**sizes, "ONE_SCALE": False, "GIVEN": False, **_format(name, native=False)}
            yield _variant(QUANTIZE, f"{shape} {name}", pointers, numbers, constants, warps)
    sizes = {"HIDDEN": 8192, "TALL": 1, "WIDE": 4096, "GROUPS": 1, "TALL_BLOCK": 1, "BLOCK": 4096}
    for given in (False, True):
        constants = {**sizes, "ONE_SCALE": True, "GIVEN": given, **_format("float8_e4m3fn", native=True)}
        label = f"tensor float8_e4m3fn {'given' if given else 'made'}, Triton's conversion"
        native = ("sm_90", "sm_100", "sm_120")
        yield _variant(QUANTIZE, label, pointers, numbers, constants, 4, targets=native)
    numbers.remove("num_parts")
    sizes = {"HIDDEN": 28672, "TALL": 1, "WIDE": 28672, "STEP": 4096, "GIVEN": False}
    for native in (False, True):
        form = {n: value for n, value in _format("float8_e4m3fn", native).items() if n != "PARTS"}
        label = "token 28672 float8_e4m3fn" + ", Triton's conversion" * native
        more = {"targets": ("sm_90", "sm_100", "sm_120")} if native else {}
        yield _variant(QUANTIZE_LONG, label, pointers, numbers, {**sizes, **form}, 16, **more)
    numbers = ["rows", *_places("")]
    constants = {"HIDDEN": 8192, "ROWS": 1, "BLOCK": 8192}
    yield _variant(LARGEST, "8192", {"x": "*bf16", "parts": "*fp32"}, numbers, constants, 8)


def _format(name: str, native: bool) -> dict[str, Any]:
    form = FORMATS[name]
    return {
        "PARTS": 512,
        "MOST": form.most,
        "FRACTION": form.fraction,
        "BIAS": form.bias,
        "NAN": form.nan,
        "UNSIGNED_ZERO": form.unsigned_zero,
        "NATIVE": native,
    }
