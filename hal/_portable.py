"""The built-in platform ``portable``: no hardware of its own; the ops, and kernels for any device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hal import _portable_cache, _portable_mla, _portable_ops, _portable_triton
from hal._arch import Arch
from hal._constraints import Anything, Constraint, OneOf, Range, Windows
from hal._device import Evidence, Probe
from hal._kernel import Band, Kernel
from hal._platform import Platform
from hal_ops import FP8_DTYPES, Op
from hal_ops.attention import ATTENTION
from hal_ops.kv_cache import KV_CACHE_WRITE
from hal_ops.kv_layout import KV_LAYOUTS
from hal_ops.merge_states import MERGE_STATES
from hal_ops.mla_attention import MLA_ATTENTION

__all__ = ["PortablePlatform"]

_SLOW = "float32 reference, slow"
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class PortablePlatform(Platform):
    """Brings the op contracts, and for each the float32 reference on any torch device."""

    name = "portable"
    vendor = "none"
    rank = -1

    def probe(self, environ: Mapping[str, str]) -> Probe:
        return Probe((), (Evidence("portable", "has no devices of its own; its kernels run on the others'"),))

    def parse_arch(self, text: str) -> Arch:
        raise ValueError("platform 'portable' has no devices: name the platform whose device you mean")

    def capabilities(self, arch: Arch) -> frozenset[str]:
        return frozenset()

    def ops(self) -> Iterable[Op]:
        return (ATTENTION, MLA_ATTENTION, KV_CACHE_WRITE, MERGE_STATES, *_portable_cache.OPS, *_portable_ops.OPS)

    def kernels(self) -> Iterable[Kernel]:
        attention = (_attention(phase) for phase in ATTENTION.phases)
        own = (*attention, *_kv_cache_write(), *_merge_states())
        others = (_portable_triton, _portable_mla, _portable_cache, _portable_ops)
        return (*own, *(kernel for module in others for kernel in module.kernels()))


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
        needs=(_portable_ops.TORCH,),
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
    return _call_kernels(KV_CACHE_WRITE, "hal_ops.kv_cache.torch_write:write", fields)


def _merge_states() -> tuple[Kernel, ...]:
    fields: dict[str, Constraint] = {
        "num_heads": Anything((1, 6)),
        "v_head_dim": Range(1, None, (64, 80)),
        "dtype": OneOf("float32", "bfloat16", "float16"),
        "deterministic": OneOf(False, True),
    }
    return _call_kernels(MERGE_STATES, "hal_ops.merge_states.torch_merge:merge", fields)


def _call_kernels(op: Op, target: str, fields: dict[str, Constraint]) -> tuple[Kernel, ...]:
    """The torch kernel and the reference of an op of one phase."""
    ranks = (("torch", target, Band.PORTABLE, "torch ops"), ("reference", op.reference["call"], Band.REFERENCE, _SLOW))
    return tuple(
        Kernel(
            name=f"{library}.{op.name}",
            op=op.name,
            phase="call",
            target=code,
            priority=band,
            fields=fields,
            evidence={"x86_64": "run"},
            needs=(_portable_ops.TORCH,),
            note=note,
        )
        for library, code, band, note in ranks
    )
