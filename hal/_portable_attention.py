"""What the ``portable`` platform declares about attention and its cache, beside Triton: data."""

from __future__ import annotations

from hal._constraints import Anything, Constraint, OneOf, Range, Windows
from hal._kernel import Band, Kernel
from hal._portable_common import TORCH
from hal_ops import FP8_DTYPES
from hal_ops.attention import PHASES
from hal_ops.kv_layout import KV_LAYOUTS

__all__ = ["KERNELS"]

_SLOW = "float32 reference, slow"
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _attention(phase: str) -> Kernel:
    fields: dict[str, Constraint] = {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": Range(1, None, (64, 80, 13)),
        "v_head_dim": Range(1, None, (64, 48)),
        "dtype": OneOf("float32", "bfloat16", "float16", "float64"),
        "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
        "page_size": Range(1, None, (16, 48)),
        "kv_layout": OneOf(*KV_LAYOUTS),
        "max_q_len": Range(1, None, (4,)),
        "causal": OneOf(True, False),
        "window": Windows(),
        "softcap": Range(0, None, (30.0,)),
        "sinks": OneOf(False, True),
        "alibi": OneOf(False, True),
        "softmax_scale": Anything((0.3,)),
        "kv_scale": OneOf("tensor", "head"),
        "qkv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
        "qkv_scale": OneOf("tensor", "head"),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
        **({"needs_grad": OneOf(False, True)} if phase == "prefill" else {}),
    }
    return Kernel(
        name=f"reference.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_ops.attention.reference:{phase}",
        priority=Band.REFERENCE,
        fields=fields,
        needs=(TORCH,),
        note=_SLOW,
    )


def _kv_cache_write() -> tuple[Kernel, ...]:
    fields: dict[str, Constraint] = {
        "num_kv_heads": Anything((1, 2)),
        "head_dim": Range(1, None, (64, 80)),
        "v_head_dim": Range(1, None, (64, 48)),
        "dtype": OneOf(*_FLOATS),
        "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
        "page_size": Range(1, None, (16, 48)),
        "kv_layout": OneOf(*KV_LAYOUTS),
        "kv_scale": OneOf("tensor", "head"),
        "deterministic": OneOf(False, True),
    }
    torch, reference = "hal_ops.kv_cache.torch_write:write", "hal_ops.kv_cache.reference:write"
    return _call_kernels("kv_cache_write", torch, reference, fields)


def _merge_states() -> tuple[Kernel, ...]:
    fields: dict[str, Constraint] = {
        "num_heads": Anything((1, 6)),
        "v_head_dim": Range(1, None, (64, 80)),
        "dtype": OneOf("float32", "bfloat16", "float16"),
        "deterministic": OneOf(False, True),
        "needs_grad": OneOf(False, True),
    }
    torch, reference = "hal_ops.merge_states.torch_merge:merge", "hal_ops.merge_states.reference:merge"
    return _call_kernels("merge_attention_states", torch, reference, fields)


def _call_kernels(op: str, torch: str, reference: str, fields: dict[str, Constraint]) -> tuple[Kernel, ...]:
    """The torch kernel, which waits for nothing and so is fit for graphs, and the reference of an op of one phase."""
    ranks = (
        ("torch", torch, Band.PORTABLE, {**fields, "graph": OneOf(False, True)}, "torch ops"),
        ("reference", reference, Band.REFERENCE, fields, _SLOW),
    )
    return tuple(
        Kernel(
            name=f"{library}.{op}",
            op=op,
            phase="call",
            target=code,
            priority=band,
            fields=declared,
            evidence={"x86_64": "run"},
            needs=(TORCH,),
            note=note,
        )
        for library, code, band, declared, note in ranks
    )


KERNELS = (*(_attention(phase) for phase in PHASES), *_kv_cache_write(), *_merge_states())
