"""Variants of the decode kernel: every configuration of every arch, with and without features, bf16, FP8, float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hal_triton_tests_aot import TARGETS, Target, Variant

from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_decode_configs import Config, configs_of
from hal_ops.attention._triton_decode_kernels import decode_kernel
from hal_ops.attention.triton_decode import constants_of

KERNEL = "hal_ops.attention._triton_decode_kernels:decode_kernel"
FP8 = {
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2fnuz": "fp8e5b16",
}
FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", **FP8}
EVERYTHING = {"window": 200, "softcap": 30.0, "sinks": True, "alibi": True, "kv_layout": "HND", "page_size": 48}


def variants() -> list[Variant]:
    return [variant for target in TARGETS.values() for variant in _of(target)]


def _of(target: Target) -> Iterator[Variant]:
    for config in configs_of(target.name):
        dim = config.dims // 2
        fields: dict[str, Any] = {"head_dim": dim, "num_q_heads": 8, "num_kv_heads": 2, "max_q_len": config.rows // 4}
        if config.item == 4:
            yield _variant(target, config, "float32", {**fields, "dtype": "float32"})
            continue
        if config.item == 2:
            yield _variant(target, config, "bfloat16", fields)
            if target.name.startswith("gfx9"):
                yield _variant(target, config, "bfloat16, HDN", {**fields, "kv_layout": "HDN"})
            if dim == 128:
                yield _variant(target, config, "bfloat16 with everything", {**fields, **EVERYTHING})
                yield _variant(target, config, "float16, 80 of 128, page 256", {
                    **fields, "head_dim": 80, "dtype": "float16", "page_size": 256
                })  # fmt: skip
            continue
        for kv_dtype in FP8:
            if FP8[kv_dtype] in target.formats:
                yield _variant(target, config, kv_dtype, {**fields, "kv_dtype": kv_dtype, "kv_scale": "head"})


def _variant(target: Target, config: Config, label: str, fields: dict[str, Any]) -> Variant:
    request = AttentionRequest(**{"page_size": 16, "kv_layout": "NHD", "return_lse": True, **fields})
    strides = (1024, 64, 16)
    constants = constants_of(request, config, config.rows, target.name, (True, True, strides, strides, strides))
    kv, own = FORMATS[request.kv_dtype], FORMATS[request.dtype]
    signature = {"q": f"*{own}", "out": f"*{own}", "k_cache": f"*{kv}", "v_cache": f"*{kv}", "tokens": "i32"}
    signature |= dict.fromkeys(("lse", "partial_out", "partial_lse", "sinks", "slopes", "k_scale", "v_scale"), "*fp32")
    signature |= dict.fromkeys(("work", "table", "counters"), "*i32") | {"scale": "fp32", "cap": "fp32"}
    strided = [name for name in decode_kernel.arg_names if name.endswith("_stride")]
    aligned = ("q", "k_cache", "v_cache", "out", "lse", "work", "partial_out", "partial_lse", *strided[:-1])
    return Variant(
        kernel=KERNEL,
        label=f"{target.name}, {config.rows} rows, {request.head_dim}, {label}",
        signature=signature | dict.fromkeys(strided, "i32"),
        constants=constants,
        aligned=aligned,
        options={"num_warps": config.warps, "num_stages": 2},
        targets=(target.name,),
        # gfx11 has 256 registers a thread, too few for tiles of heads of 256; those of sm_90 were measured.
        main=label in ("bfloat16", *FP8)
        and target.name != "sm_90"
        and not (target.name == "gfx1100" and config.dims > 256),
    )
