"""What the ``portable`` platform declares about the ops of a decoder layer beside attention: data."""

from __future__ import annotations

from collections.abc import Mapping

from hal._constraints import Anything, Constraint, OneOf, Range
from hal._kernel import Band, Kernel
from hal._portable_common import TORCH, TRITON
from hal_ops import FP8_DTYPES

__all__ = ["KERNELS"]

_MODULES = {
    "rms_norm": "norm",
    "fused_add_rms_norm": "norm",
    "layer_norm": "norm",
    "silu_and_mul": "gate",
    "gelu_and_mul": "gate",
    "rotary_embedding": "rotary",
    "fp8_quantize": "quantize",
}
_HALVES = ("float32", "bfloat16", "float16")
_FORMATS = OneOf(*_HALVES, "float64")
_FLAG = OneOf(False, True)
_RUN = ("sm_90",)
_COMPILED = ("sm_80", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")

Fields = dict[str, Constraint]


def _triton(op: str) -> Kernel:
    return Kernel(
        name=f"triton.{op}",
        op=op,
        phase="call",
        target=f"hal_ops.{op}.triton_{_MODULES[op]}:{op}",
        priority=Band.PORTABLE + 50,
        capabilities=frozenset({"triton"}),
        needs=(TORCH, TRITON),
        fields={**_narrow(_fields(op)), "graph": _FLAG},
        evidence={**dict.fromkeys(_RUN, "run"), **dict.fromkeys(_COMPILED, "compiled"), "*": "claimed"},
    )


def _torch(op: str) -> Kernel:
    gradient: Fields = {} if op == "fp8_quantize" else {"needs_grad": _FLAG}
    # torch's layer norm loses digits where the mean is far above the deviation, as in rows of one element
    least: Fields = {"hidden_size": Range(2, None, (64, 80))} if op == "layer_norm" else {}
    return Kernel(
        name=f"torch.{op}",
        op=op,
        phase="call",
        target=f"hal_ops.{op}.torch_{_MODULES[op]}:{op}",
        priority=Band.PORTABLE,
        needs=(TORCH,),
        fields={**_fields(op), **least, "graph": _FLAG, **gradient},
        evidence={"x86_64": "run", **dict.fromkeys(_RUN, "run")},
        note="torch ops",
    )


def _reference(op: str) -> Kernel:
    return Kernel(
        name=f"reference.{op}",
        op=op,
        phase="call",
        target=f"hal_ops.{op}.reference:{op}",
        priority=Band.REFERENCE,
        fields=_fields(op),
        evidence={"x86_64": "run"},
        note="float32 reference, slow",
    )


def _narrow(fields: Fields) -> Fields:
    """Without float64."""
    formats = [n for n in ("dtype", "weight_dtype", "table_dtype") if n in fields]
    return {**fields, **dict.fromkeys(formats, OneOf(*_HALVES))}


def _fields(op: str) -> Fields:
    """What every kernel of the op handles."""
    common: Fields = {"dtype": _FORMATS, "deterministic": _FLAG}
    return {**(_ROTARY if op == "rotary_embedding" else _ROWS), **common, **_OWN.get(op, {})}


_ROWS: Fields = {"hidden_size": Range(1, None, (64, 80, 300))}
_RMS: Fields = {
    "weight_dtype": _FORMATS,
    "eps": Range(0, None, (1e-5,)),
    "weight_offset": Anything((1.0,)),
}
_OWN: Mapping[str, Fields] = {
    "rms_norm": _RMS,
    "fused_add_rms_norm": _RMS,
    "layer_norm": {
        "weight_dtype": _FORMATS,
        "weight": OneOf(True, False),
        "bias": OneOf(True, False),
        "eps": Range(0, None, (1e-6,)),
    },
    "gelu_and_mul": {"approximate": OneOf("none", "tanh")},
    "fp8_quantize": {
        "fp8_dtype": OneOf(*FP8_DTYPES),
        "granularity": OneOf("tensor", "token", "block"),
        "block_size": Range(1, None, (64, 48)),
        "block_rows": Range(1, None, (64, 3)),
        "static": _FLAG,
    },
}
_ROTARY: Fields = {
    "num_q_heads": Range(1, None, (6, 14)),
    "num_kv_heads": Range(1, None, (2,)),
    "head_dim": Range(2, None, (64, 80)),
    "rotary_dim": Range(2, None, (64, 32)),
    "style": OneOf("neox", "interleaved"),
    "table_dtype": _FORMATS,
}
KERNELS = tuple(make(op) for op in _MODULES for make in (_triton, _torch, _reference))
