"""Variants of the kernels of the cache and of the merge."""

from __future__ import annotations

from typing import Any

from hal_triton_tests_aot import TARGETS, Variant

from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.triton_write import constants_of, write_kernel
from hal_ops.kv_pages_copy import KvPagesCopyRequest
from hal_ops.kv_pages_copy.triton_copy import constants_of as copy_constants_of
from hal_ops.kv_pages_gather import KvPagesGatherRequest
from hal_ops.kv_pages_gather.triton_gather import constants_of as gather_constants_of
from hal_ops.merge_states.triton_merge import merge_kernel
from hal_ops.rotary_kv_cache_write import RotaryKvCacheWriteRequest
from hal_ops.rotary_kv_cache_write.triton_rotary_write import constants_of as rotary_constants_of
from hal_ops.rotary_kv_cache_write.triton_rotary_write import rotary_write_kernel

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
        *_writes("bfloat16", kv_layout="HDN"),
        *_writes("float8_e5m2"),
        *_writes("float8_e4m3fnuz"),
        *_writes("float32", dtype="float32", head_dim=80),
        _rotary(),
        _rotary("float8_e4m3fn", rotary_dim=128, kv_scale="head"),
        *(_merge(dim) for dim in (64, 80, 128, 256)),
        *(_pages(kv_dtype) for kv_dtype in ("float8_e4m3fn", "bfloat16")),
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
            label=f"{own} to {kv}, heads of {request.head_dim}{', HDN' * (request.kv_layout == 'HDN')}",
            signature=signature,
            constants=constants_of(request),
            aligned=("k", "v", "k_cache", "v_cache", *strides),
            options={"num_warps": 4},
            targets=_targets(kv),
        )
    ]


def _rotary(kv_dtype: str = "bfloat16", **fields: Any) -> Variant:
    given = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "rotary_dim": 64, "kv_dtype": kv_dtype, **fields}
    request, kv = RotaryKvCacheWriteRequest(**given), FORMATS[kv_dtype]
    strides = _strides(rotary_write_kernel.arg_names)
    signature = {**dict.fromkeys(("q", "k", "v", "q_out"), "*bf16"), "k_cache": f"*{kv}", "v_cache": f"*{kv}"}
    signature |= dict.fromkeys(("cos", "sin", "k_scale", "v_scale"), "*fp32")
    signature |= {"positions": "*i64", "slot_mapping": "*i64", "tokens": "i32", "max_position": "i32"}
    return Variant(
        kernel="hal_ops.rotary_kv_cache_write.triton_rotary_write:rotary_write_kernel",
        label=f"bf16 to {kv}, heads of 128, {request.rotary_dim} turned",
        signature={**signature, **dict.fromkeys(strides, "i32")},
        constants=rotary_constants_of(request),
        aligned=("q", "k", "v", "q_out", "k_cache", "v_cache", "cos", "sin", *strides),
        options={"num_warps": 4},
        targets=_targets(kv),
    )


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


def _pages(kv_dtype: str) -> Variant:
    request = KvPagesCopyRequest(num_kv_heads=8, head_dim=128, kv_dtype=kv_dtype)
    bits = {"float8_e4m3fn": "i8", "bfloat16": "i16"}[kv_dtype]
    strides = ("page_stride", "outer_stride", "inner_stride")
    return Variant(
        kernel="hal_ops.kv_pages_copy.triton_copy:copy_kernel",
        label=f"{bits}, pages of 16",
        signature={"cache": f"*{bits}", "source": "*i64", "target": "*i64", **dict.fromkeys(strides, "i32")},
        constants=copy_constants_of(request, 128),
        aligned=("cache", *strides),
        options={"num_warps": 4},
    )


def _gather() -> Variant:
    request = KvPagesGatherRequest(num_kv_heads=8, head_dim=128, kv_dtype="float8_e5m2", kv_scale="head")
    strides = ("table_stride", "page_stride", "slot_stride", "head_stride")
    pointers = {"cache": "*fp8e5", "out": "*bf16", "table": "*i32", "lengths": "*i32", "scale": "*fp32"}
    return Variant(
        kernel="hal_ops.kv_pages_gather.triton_gather:gather_kernel",
        label="fp8e5 to bf16",
        signature={**pointers, "row_programs": "i32", **dict.fromkeys(strides, "i32")},
        constants=gather_constants_of(request, 128),
        aligned=("cache", "out", *strides[1:]),
        options={"num_warps": 4},
        targets=_targets("fp8e5"),
    )
