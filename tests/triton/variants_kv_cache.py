"""Variants of the kernels of the cache and of the merge."""

from __future__ import annotations

from typing import Any

from hal_triton_tests_aot import TARGETS, Variant

from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.triton_write import constants_of, write_kernel
from hal_ops.merge_states.triton_merge import merge_kernel

FORMATS = {
    "bfloat16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
}


def variants() -> list[Variant]:
    return [
        *_writes("bfloat16"),
        *_writes("float8_e4m3fn", kv_scale="head", kv_layout="HND"),
        *_writes("float8_e5m2"),
        *_writes("float8_e4m3fnuz"),
        *_writes("float32", dtype="float32", head_dim=80),
        _rotary(),
        *(_merge(dim) for dim in (64, 80, 128, 256)),
        *(_pages(bits) for bits in ("i8", "i16")),
        _gather(),
    ]


def _targets(kv: str) -> tuple[str, ...]:
    return tuple(name for name, target in TARGETS.items() if not kv.startswith("fp8") or kv in target.formats)


def _strides(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith("_stride")]


def _writes(kv_dtype: str, **fields: Any) -> list[Variant]:
    request = KvCacheWriteRequest(**{"num_kv_heads": 8, "head_dim": 128, "kv_dtype": kv_dtype, **fields})
    own, kv = FORMATS[request.dtype], FORMATS[request.kv_dtype]
    strides = _strides(write_kernel.arg_names)
    signature = {"k": f"*{own}", "v": f"*{own}", "k_cache": f"*{kv}", "v_cache": f"*{kv}", "slot_mapping": "*i64"}
    signature |= {"k_scale": "*fp32", "v_scale": "*fp32", "tokens": "i32", **dict.fromkeys(strides, "i32")}
    return [
        Variant(
            kernel="hal_ops.kv_cache.triton_write:write_kernel",
            label=f"{own} to {kv}, heads of {request.head_dim}",
            signature=signature,
            constants=constants_of(request),
            aligned=("k", "v", "k_cache", "v_cache", *strides),
            options={"num_warps": 4},
            targets=_targets(kv),
        )
    ]


def _rotary() -> Variant:
    from hal_ops.kv_cache.triton_rotary import rotary_write_kernel

    strides = _strides(rotary_write_kernel.arg_names)
    signature = dict.fromkeys(("q", "k", "v", "q_out", "k_cache", "v_cache"), "*bf16")
    signature |= dict.fromkeys(("cos", "sin", "k_scale", "v_scale"), "*fp32")
    signature |= {"positions": "*i64", "slot_mapping": "*i64", "tokens": "i32", **dict.fromkeys(strides, "i32")}
    return Variant(
        kernel="hal_ops.kv_cache.triton_rotary:rotary_write_kernel",
        label="bf16, heads of 128, 64 turned",
        signature=signature,
        constants={
            "Q_HEADS": 32, "KV_HEADS": 8, "DIM": 128, "V_DIM": 128, "ROTARY": 64, "INTERLEAVED": False, "PAGE_SIZE": 16,
            "SCALES": 0, "MOST": 0.0, "BLOCK_T": 32, "BLOCK_P": 32, "BLOCK_REST": 64, "BLOCK_V": 128,
        },
        aligned=("q", "k", "v", "q_out", "k_cache", "v_cache", "cos", "sin", *strides),
        options={"num_warps": 4},
    )  # fmt: skip


def _merge(dim: int) -> Variant:
    block = 1 << (dim - 1).bit_length()
    outs = dict.fromkeys(("out_a", "out_b", "out"), "*bf16")
    return Variant(
        kernel="hal_ops.merge_states.triton_merge:merge_kernel",
        label=f"bf16, heads of {dim}",
        signature={**outs, **dict.fromkeys(("lse_a", "lse_b", "lse"), "*fp32"), "rows": "i32"},
        constants={"DIM": dim, "BLOCK_R": 2048 // block, "BLOCK_D": block},
        aligned=tuple(n for n in merge_kernel.arg_names[:6]),
        options={"num_warps": 4},
    )


def _pages(bits: str) -> Variant:
    strides = ("page_stride", "outer_stride", "inner_stride")
    return Variant(
        kernel="hal_ops.kv_cache.triton_pages:copy_kernel",
        label=f"{bits}, pages of 16",
        signature={"cache": f"*{bits}", "source": "*i64", "target": "*i64", **dict.fromkeys(strides, "i32")},
        constants={"OUTER": 16, "INNER": 8, "DIM": 128, "BLOCK": 4096, "BLOCKS": 4},
        aligned=("cache", *strides),
        options={"num_warps": 4},
    )


def _gather() -> Variant:
    strides = ("table_stride", "page_stride", "slot_stride", "head_stride")
    pointers = {"cache": "*fp8e5", "out": "*bf16", "table": "*i32", "lengths": "*i32", "scale": "*fp32"}
    return Variant(
        kernel="hal_ops.kv_cache.triton_pages:gather_kernel",
        label="fp8e5 to bf16",
        signature={**pointers, **dict.fromkeys(strides, "i32")},
        constants={"HEADS": 8, "DIM": 128, "PAGE_SIZE": 16, "SCALES": 2, "BLOCK_T": 2, "BLOCK_C": 1024, "BLOCKS": 1},
        aligned=("cache", "out", *strides[1:]),
        options={"num_warps": 4},
        targets=_targets("fp8e5"),
    )
