"""Variants of the prefill and extend kernels: every configuration of every arch, in the formats that models use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hal_triton_tests_aot import TARGETS, Variant, resolve

from hal_ops._triton_columns import vectors
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_configs import (
    HOPPER_EXTEND,
    HOPPER_FP8,
    HOPPER_FP8_CACHE,
    HOPPER_PLAIN,
    HOPPER_PREFILL,
    HOPPER_ROWS,
    Config,
    Hopper,
    configs_of,
    in_boxes,
    keys_as_they_are,
    padded_on,
    rounds_queries,
)
from hal_ops.attention._triton_features import Features, cut, pack_heads

PREFILL = "hal_ops.attention.triton_prefill:prefill_kernel"
EXTEND = "hal_ops.attention.triton_extend:extend_kernel"
HOPPER_KERNELS = {
    "prefill": "hal_ops.attention.triton_hopper:hopper_prefill",
    "extend": "hal_ops.attention.triton_hopper:hopper_extend",
}
FP8 = {"float8_e4m3fn": "fp8e4nv", "float8_e4m3fnuz": "fp8e4b8", "float8_e5m2": "fp8e5", "float8_e5m2fnuz": "fp8e5b16"}
EVERYTHING: dict[str, Any] = {"window": 1024, "softcap": 30.0, "sinks": True, "alibi": True}
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", **FP8}


def variants() -> Iterator[Variant]:
    for arch, target in TARGETS.items():
        for config in configs_of(arch):
            yield from _portable(config, (config.dim, config.dim), "bfloat16", arch)
            if arch.startswith("gfx9"):
                yield _extend(config, (config.dim, config.dim), "bfloat16", arch, kv_layout="HDN")
            for kv_dtype in (name for name, short in FP8.items() if short in target.formats):
                yield _extend(config, (config.dim, config.dim), "bfloat16", arch, kv_dtype=kv_dtype)
                yield _prefill(config, (config.dim, config.dim), "bfloat16", arch, qkv_dtype=kv_dtype, phases="prefill")
            if config.dim == 128:
                yield from _with_everything(config, arch)
        for config in configs_of(arch, wide=True):
            yield from _portable(config, (config.dim, config.dim), "float32", arch)
    for config in (*HOPPER_PREFILL, HOPPER_PLAIN):
        yield from _hoppers("prefill", config, "bfloat16", 16)
        yield from _hoppers("prefill", config, "float16", 16, window=1024, softcap=30.0, sinks=True)
    for name in ("float8_e4m3fn", "float8_e5m2"):
        yield from _hoppers("prefill", HOPPER_FP8, "bfloat16", 16, qkv_dtype=name, phases="prefill")
        for config in HOPPER_FP8_CACHE:
            for page_size in (16, config.block_n):
                for rounds in (False, True) if name == "float8_e4m3fn" else (False,):
                    yield from _hoppers("extend", config, "bfloat16", page_size, kv_dtype=name, fp8_query=rounds)
    for config in HOPPER_EXTEND:
        yield from _hoppers("extend", config, "bfloat16", config.block_n)
    for config in HOPPER_ROWS:
        yield from _hoppers("extend", config, "bfloat16", 16)


def _portable(config: Config, dims: tuple[int, int], dtype: str, arch: str) -> Iterator[Variant]:
    yield _prefill(config, dims, dtype, arch)
    yield _prefill(config, dims, dtype, arch, window=1024, softcap=30.0, sinks=True)
    yield _extend(config, dims, dtype, arch)


def _with_everything(config: Config, arch: str) -> Iterator[Variant]:
    """Every feature at once, over heads of unequal dims and, where there is one, an FP8 cache with a scale a head."""
    yield _prefill(config, (128, 64), "bfloat16", arch, **EVERYTHING)
    formats = [name for name, short in FP8.items() if short in TARGETS[arch].formats][:1]
    for cache in ({}, *({"kv_dtype": name, "kv_scale": "head"} for name in formats)):
        yield _extend(config, (128, 64), "bfloat16", arch, return_lse=True, **EVERYTHING, **cache)


def _request(dims: tuple[int, int], dtype: str, **fields: Any) -> AttentionRequest:
    return AttentionRequest(
        num_q_heads=32, num_kv_heads=8, head_dim=dims[0], v_head_dim=dims[1], dtype=dtype, **{"page_size": 16, **fields}
    )


def _prefill(config: Config, dims: tuple[int, int], dtype: str, arch: str, **fields: Any) -> Variant:
    request = _request(dims, dtype, **fields)
    scales = 0 if request.qkv_dtype == dtype else 1
    constants = {"RAGGED": True, "UNIT": 16, "LSE": True, **dict.fromkeys(("Q_SCALES", "K_SCALES", "V_SCALES"), scales)}
    return _variant(PREFILL, _label(request, arch, config), config, request, constants, (arch,))


def _extend(config: Config, dims: tuple[int, int], dtype: str, arch: str, **fields: Any) -> Variant:
    request = _request(dims, dtype, **fields)
    scales = 0 if request.kv_dtype == dtype else 2 if request.kv_scale == "head" else 1
    constants = {"PAGE_SIZE": 16, "LSE": request.return_lse, "K_SCALES": scales, "V_SCALES": scales}
    constants |= vectors(request.kv_layout, request.kv_dtype)
    return _variant(EXTEND, _label(request, arch, config), config, request, constants, (arch,))


def _hoppers(phase: str, config: Hopper, dtype: str, page_size: int, **fields: Any) -> Iterator[Variant]:
    """With programs of several tiles and of one: a launch of few tiles has the latter, whatever the phase."""
    for loop in (True, False):
        yield _hopper(phase, config, dtype, page_size, loop=loop, **fields)


def _hopper(phase: str, config: Hopper, dtype: str, page_size: int, *, loop: bool, **fields: Any) -> Variant:
    request = _request((config.dim, config.v_dim), dtype, page_size=page_size, **fields)
    tma = phase == "prefill" or in_boxes(config, request)
    constants = {"RAGGED": True, "UNIT": 16, "TMA": tma, "LSE": phase == "prefill", "LOOP": loop}
    scales = 0 if (request.qkv_dtype if phase == "prefill" else request.kv_dtype) == dtype else 1
    constants |= dict.fromkeys(("Q_SCALES", "K_SCALES", "V_SCALES"), scales)
    constants |= {"PAGE_SIZE": page_size, "ROUND_Q": rounds_queries(request)} if phase == "extend" else {}
    label = f"{_label(request, 'sm_90', config)}{f', page {page_size}' * (phase == 'extend')}"
    label += ", a tile a program" * (not loop)
    return _variant(HOPPER_KERNELS[phase], label, config, request, constants, ("sm_90",))


def _label(request: AttentionRequest, arch: str, config: Config | Hopper) -> str:
    special = ", window, softcap, sinks" * bool(request.softcap) + ", slopes" * request.alibi
    cache = f", KV {request.kv_dtype}" * (request.kv_dtype != request.dtype)
    cache += f", q, k, v {request.qkv_dtype}" * (request.qkv_dtype != request.dtype)
    cache += ", q rounded to it" * rounds_queries(request)
    layout = ", HDN" * (request.kv_layout == "HDN")
    return f"{request.head_dim}/{request.v_head_dim} {request.dtype}{cache}{layout}{special}, {config}, {arch}"


def _variant(
    kernel: str, label: str, config: Config | Hopper, request: AttentionRequest, constants: dict[str, Any],
    targets: tuple[str, ...],
) -> Variant:  # fmt: skip
    names = resolve(kernel).arg_names
    padded = padded_on(targets[0], request, cached="PAGE_SIZE" in constants)
    known = {
        **Features.of(request, padded=padded).constants,
        **constants,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    known["KEYS_AS_THEY_ARE"] = keys_as_they_are(targets[0], request, known["CUT"], known["REST"])
    known["PACK"] = pack_heads(request.group_size, config.block_m)
    if isinstance(config, Hopper):
        known.update(config.constants)
        options = {"num_warps": 4, "maxnreg": config.most_registers}
    else:
        options = {"num_warps": config.warps, "num_stages": config.stages}
    absent = {
        "sinks": request.sinks,
        "slopes": request.alibi,
        "q_scale": known.get("Q_SCALES"),
        "k_scale": known.get("K_SCALES"),
        "v_scale": known.get("V_SCALES"),
    }
    known.update(dict.fromkeys(name for name, present in absent.items() if not present))
    signature = {n: t for n in names if n not in known and (t := _type(n, config, request, constants))}
    aligned = tuple(
        n for n in signature if n in ("q", "k", "v", "out") or (n.endswith("stride") and n != "table_stride")
    )
    constants = {n: known[n] for n in names if n in known}
    return Variant(kernel, label, signature, constants, aligned, options, targets, _must_fit(request, targets[0]))


def _must_fit(request: AttentionRequest, arch: str) -> bool:
    """Whether not to spill is asked: of 16-bit formats, but for heads of 256 on gfx11, whose 256 registers are too few,
    on sm_90, whose tiles are the fastest of those that were measured, whatever they spill, and of every feature at once."""
    if request.alibi or request.dtype == "float32" or arch == "sm_90":
        return False
    return not (arch.startswith("gfx11") and request.head_dim > 128)


def _type(name: str, config: Config | Hopper, request: AttentionRequest, constants: dict[str, Any]) -> str:
    if "_box" in name:
        return _box(name, config, request, constants)
    if name == "out":
        return f"*{TYPES[request.dtype]}"
    if name in ("q", "k", "v"):
        return f"*{TYPES[request.kv_dtype if 'PAGE_SIZE' in constants and name != 'q' else request.qkv_dtype]}"
    if name in ("lse", "sinks", "slopes", "q_scale", "k_scale", "v_scale"):
        return "*fp32" if name != "lse" or constants["LSE"] else f"*{TYPES[request.dtype]}"
    if name in ("cu_q", "cu_k", "kv_lens", "table", "tiles"):
        return "*i32"
    return "fp32" if name in ("scale", "cap") else "i32"


def _box(name: str, config: Config | Hopper, request: AttentionRequest, constants: dict[str, Any]) -> str:
    """A box of the copy engine, or a pointer where there is none."""
    width = cut(request.head_dim if name[0] == "k" else request.v_head_dim)[name.endswith("rest")]
    block = [config.block_n, width]
    element = TYPES[request.kv_dtype if "PAGE_SIZE" in constants else request.qkv_dtype]
    if not constants["TMA"] or not width:
        return f"*{element}"
    from triton import language as tl
    from triton.experimental.gluon.language import NVMMASharedLayout

    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp8e4nv": tl.float8e4nv, "fp8e5": tl.float8e5}
    layout = NVMMASharedLayout.get_default_for(block, types[element])
    return f"tensordesc<{element}{block},{layout!r}>"
