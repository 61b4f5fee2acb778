"""Variants of the kernels of latent attention: every configuration of every arch, in both phases, and FP8 caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hal_triton_tests_aot import TARGETS, Target, Variant

from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention._triton_mla_configs import Config, configs_of
from hal_ops.mla_attention._triton_mla_kernels import merge_kernel, mla_kernel
from hal_ops.mla_attention.triton_mla import constants_of, merge_constants_of

KERNELS = "hal_ops.mla_attention._triton_mla_kernels"
FP8 = {
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2fnuz": "fp8e5b16",
}
FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", **FP8}


def variants() -> list[Variant]:
    return [variant for target in TARGETS.values() for variant in _of(target)]


def _of(target: Target) -> Iterator[Variant]:
    for config in configs_of(target.name):
        if config.item == 4:
            yield _variant(target, config, "float32", dtype="float32")
            continue
        if config.item == 1:
            formats = [kv_dtype for kv_dtype in FP8 if FP8[kv_dtype] in target.formats]
            yield from (_variant(target, config, kv_dtype, kv_dtype=kv_dtype) for kv_dtype in formats)
            continue
        yield _variant(target, config, "bfloat16")
        yield _variant(target, config, "float16, 4 queries, rank 256, page 48", 4, dtype="float16", kv_lora_rank=256, page_size=48)  # noqa: E501 # fmt: skip
    yield _merge(target, max(configs_of(target.name), key=lambda c: c.rows))


def _variant(target: Target, config: Config, label: str, tokens: int = 1, **fields: Any) -> Variant:
    request = _request(config, tokens, **fields)
    own = FORMATS[request.dtype]
    names = mla_kernel.arg_names
    strided = [name for name in names if name.endswith("_stride")]
    signature = dict.fromkeys(("q", "out"), f"*{own}") | {"cache": f"*{FORMATS[request.kv_dtype]}"}
    signature |= dict.fromkeys(("lse", "partial_out", "partial_lse", "kv_scale"), "*fp32")
    signature |= dict.fromkeys(("work", "table"), "*i32") | {"tokens": "i32", "scale": "fp32"}
    return Variant(
        kernel=f"{KERNELS}:mla_kernel",
        label=f"{target.name}, {config.rows} rows, {label}",
        signature=signature | dict.fromkeys(strided, "i32"),
        constants=constants_of(request, config, config.rows, tokens, (True, True, (), ())),
        aligned=("q", "cache", "out", "lse", "work", "partial_out", "partial_lse", *strided[:-1]),
        options={"num_warps": config.warps, "num_stages": 2},
        targets=(target.name,),
        # gfx11 and gfx12 have 256 registers a thread: too few for sums of latents of 512, and for converting a block too.
        # Those of sm_90 ran as they are.
        main=(label == "bfloat16" and target.name != "gfx1100")
        or (label in FP8 and target.name not in ("sm_90", "gfx1201")),
    )


def _merge(target: Target, config: Config) -> Variant:
    request = _request(config, 1)
    signature = dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32")
    signature |= {"out": "*bf16", "work": "*i32", "tokens": "i32"}
    return Variant(
        kernel=f"{KERNELS}:merge_kernel",
        label=f"{target.name}, {config.rows} rows",
        signature=signature,
        constants=merge_constants_of(request, config.rows, 1, (True, True, (), ())),
        aligned=tuple(name for name in merge_kernel.arg_names if name in signature and name != "tokens"),
        options={"num_warps": 4, "num_stages": 1},
        targets=(target.name,),
    )


def _request(config: Config, tokens: int, **fields: Any) -> MlaAttentionRequest:
    return MlaAttentionRequest(
        **{
            "num_q_heads": 128 if tokens == 1 else 16,
            "page_size": 64,
            "max_q_len": tokens,
            "return_lse": True,
            **fields,
        }
    )
