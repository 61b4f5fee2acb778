"""What the ``portable`` platform declares about the ops of the KV cache beside its plain write: data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hal._constraints import Anything, Constraint, OneOf, Range
from hal._device import Device
from hal._kernel import Band, Kernel
from hal._portable_ops import TORCH, TRITON
from hal._reason import Reason
from hal_ops import FP8_DTYPES, Op, Request, is_fp8
from hal_ops.kv_pages_copy import KV_PAGES_COPY
from hal_ops.kv_pages_gather import KV_PAGES_GATHER
from hal_ops.rotary_kv_cache_write import ROTARY_KV_CACHE_WRITE

__all__ = ["OPS", "cache_format", "fp8_format", "kernels"]

OPS: tuple[Op, ...] = (ROTARY_KV_CACHE_WRITE, KV_PAGES_COPY, KV_PAGES_GATHER)

_MODULES = {"rotary_kv_cache_write": "rotary_write", "kv_pages_copy": "copy", "kv_pages_gather": "gather"}
_TRITON_FLOATS = ("float16", "bfloat16", "float32")
_FLOATS = (*_TRITON_FLOATS, "float64")
_FLAG = OneOf(False, True)
_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_COMPILED = dict.fromkeys(_ARCHS, "compiled")

Fields = dict[str, Constraint]


def kernels() -> tuple[Kernel, ...]:
    """For each op: the Triton kernel, the one of torch's operators, and the reference."""
    return tuple(kernel for op in OPS for kernel in _kernels(op))


def _kernels(op: Op) -> tuple[Kernel, ...]:
    code = f"hal_ops.{op.name}.{{}}_{_MODULES[op.name]}:{op.name}"
    all_formats, fields = {**_FIELDS[op.name], "deterministic": _FLAG}, _narrow(op)
    triton = Kernel(
        name=f"triton.{op.name}",
        op=op.name,
        phase="call",
        target=code.format("triton"),
        priority=Band.PORTABLE + 50,
        needs=(TORCH, TRITON),
        capabilities=frozenset({"triton"}),
        fields={**fields, "deterministic": _FLAG, "graph": _FLAG},
        check=None if op is KV_PAGES_COPY else cache_format,
        evidence={**_COMPILED, "*": "claimed"},
    )
    ranks = (
        ("torch", code.format("torch"), Band.PORTABLE, {**all_formats, "graph": _FLAG}, "torch ops"),
        ("reference", op.reference["call"], Band.REFERENCE, all_formats, "float32 reference, slow"),
    )
    plain = (
        Kernel(
            name=f"{library}.{op.name}",
            op=op.name,
            phase="call",
            target=target,
            priority=band,
            needs=(TORCH,),
            fields=declared,
            evidence={"x86_64": "run"},
            note=note,
        )
        for library, target, band, declared, note in ranks
    )
    return (triton, *plain)


def cache_format(request: Request, device: Device) -> Sequence[Reason]:
    """Which FP8 formats Triton converts is said by the device's platform."""
    return fp8_format(str(request.kv_dtype), "kv_dtype", device)  # type: ignore[attr-defined]


def fp8_format(given: str, field: str, device: Device) -> Sequence[Reason]:
    """The same for the format that ``field`` holds."""
    if not is_fp8(given) or f"triton_{given.replace('float8', 'fp8')}" in device.capabilities:
        return []
    return [Reason("capability_missing", f"Triton does not convert {given} on {device.arch.name}", field, given)]


def _narrow(op: Op) -> Fields:
    """Without float64, which Triton's kernels do not take; pages are copied in any format."""
    if op is KV_PAGES_COPY:
        return _FIELDS[op.name]
    narrow: Mapping[str, Constraint] = {
        "dtype": OneOf(*_TRITON_FLOATS),
        "table_dtype": OneOf("float32", "bfloat16", "float16"),
        "kv_dtype": OneOf(*_TRITON_FLOATS, *FP8_DTYPES),
    }
    return {name: narrow.get(name, rule) for name, rule in _FIELDS[op.name].items()}


_CACHE: Fields = {
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Range(1, None, (64, 80)),
    "v_head_dim": Range(1, None, (64, 48)),
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HND"),
}
_SCALED: Fields = {**_CACHE, "dtype": OneOf(*_FLOATS), "kv_scale": OneOf("tensor", "head")}
_FIELDS: Mapping[str, Fields] = {
    "rotary_kv_cache_write": {
        **_SCALED,
        "num_q_heads": Range(1, None, (6, 14)),
        "num_kv_heads": Range(1, None, (2,)),
        "head_dim": Range(2, None, (64, 80)),
        "rotary_dim": Range(2, None, (64, 32)),
        "style": OneOf("neox", "interleaved"),
        "table_dtype": OneOf("float32", "bfloat16", "float16", "float64"),
    },
    "kv_pages_copy": _CACHE,
    "kv_pages_gather": _SCALED,
}
