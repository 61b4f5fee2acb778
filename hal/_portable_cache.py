"""What the ``portable`` platform declares about the ops of the KV cache beside its plain write: data."""

from __future__ import annotations

from collections.abc import Mapping

from hal._constraints import Anything, Constraint, OneOf, Range
from hal._kernel import Band, Kernel
from hal._portable_common import TORCH, TRITON, cache_format
from hal_ops import FP8_DTYPES

__all__ = ["KERNELS"]

_MODULES = {"rotary_kv_cache_write": "rotary_write", "kv_pages_copy": "copy", "kv_pages_gather": "gather"}
_TRITON_FLOATS = ("float16", "bfloat16", "float32")
_FLOATS = (*_TRITON_FLOATS, "float64")
_FLAG = OneOf(False, True)
_COMPILED = ("sm_80", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_EVIDENCE = {"sm_90": "run", **dict.fromkeys(_COMPILED, "compiled"), "*": "claimed"}
"""On an H200 ``tests/triton/test_kv_cache.py`` has run, graphs among it."""

Fields = dict[str, Constraint]


def _kernels(op: str) -> tuple[Kernel, ...]:
    """The Triton kernel of an op, the one of torch's operators, and the reference."""
    code = f"hal_ops.{op}.{{}}:{op}"
    all_formats, fields = {**_FIELDS[op], "deterministic": _FLAG}, _narrow(op)
    triton = Kernel(
        name=f"triton.{op}",
        op=op,
        phase="call",
        target=code.format(f"triton_{_MODULES[op]}"),
        priority=Band.PORTABLE + 50,
        needs=(TORCH, TRITON),
        capabilities=frozenset({"triton"}),
        fields={**fields, "deterministic": _FLAG, "graph": _FLAG},
        check=None if op == "kv_pages_copy" else cache_format,
        evidence=_EVIDENCE,
    )
    ranks = (
        ("torch", code.format(f"torch_{_MODULES[op]}"), Band.PORTABLE, {**all_formats, "graph": _FLAG}, "torch ops"),
        ("reference", code.format("reference"), Band.REFERENCE, all_formats, "float32 reference, slow"),
    )
    plain = (
        Kernel(
            name=f"{library}.{op}",
            op=op,
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


def _narrow(op: str) -> Fields:
    """Without float64, which Triton's kernels do not take; pages are copied in any format."""
    if op == "kv_pages_copy":
        return _FIELDS[op]
    narrow: Mapping[str, Constraint] = {
        "dtype": OneOf(*_TRITON_FLOATS),
        "table_dtype": OneOf("float32", "bfloat16", "float16"),
        "kv_dtype": OneOf(*_TRITON_FLOATS, *FP8_DTYPES),
    }
    return {name: narrow.get(name, rule) for name, rule in _FIELDS[op].items()}


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
KERNELS = tuple(kernel for op in _MODULES for kernel in _kernels(op))
