"""What the ``portable`` platform declares about latent attention: data."""

from __future__ import annotations

from hal._constraints import Anything, Constraint, Either, OneOf, Range, SameAs
from hal._kernel import Archs, Band, Kernel
from hal._portable_common import TORCH, TRITON, cache_format
from hal_ops import FP8_DTYPES
from hal_ops.mla_attention import PHASES

__all__ = ["KERNELS"]

_FLAG = OneOf(False, True)
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_EVIDENCE = {**dict.fromkeys(_ARCHS, "compiled"), "sm_90": "run", "*": "claimed"}
_FIELDS: dict[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 16)),
    "kv_lora_rank": Range(1, None, (512, 48)),
    "qk_rope_head_dim": Range(1, None, (64, 16, 13)),
    "dtype": OneOf(*_FLOATS),
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48)),
    "max_q_len": Range(1, None, (4,)),
    "causal": OneOf(True, False),
    "softmax_scale": Anything((0.3,)),
    "return_lse": _FLAG,
    "deterministic": _FLAG,
}


def _reference(phase: str) -> Kernel:
    return Kernel(
        name=f"reference.mla_{phase}",
        op="mla_attention",
        phase=phase,
        target=f"hal_ops.mla_attention.reference:{phase}",
        priority=Band.REFERENCE,
        fields=_FIELDS,
        needs=(TORCH,),
        evidence={"x86_64": "run"},
        note="float32 reference, slow",
    )


def _torch(phase: str) -> Kernel:
    """For devices that Triton is not for."""
    return Kernel(
        name=f"torch.mla_{phase}",
        op="mla_attention",
        phase=phase,
        target=f"hal_ops.mla_attention.torch_latent:{phase}",
        priority=Band.PORTABLE,
        needs=(TORCH,),
        fields=_FIELDS,
        evidence={"x86_64": "run"},
        copies="the latents of each row into one block a call, in float32",
        note="torch matrix products",
    )


def _torch_cpu(phase: str) -> Kernel:
    return Kernel(
        name=f"torch_cpu.mla_{phase}",
        op="mla_attention",
        phase=phase,
        target=f"hal_ops.mla_attention.torch_mla:{phase}",
        priority=Band.PORTABLE + 10,
        platforms={"cpu": Archs()},
        needs=(TORCH,),
        fields=_FIELDS,
        evidence={"x86_64": "run"},
        copies="the pages of each row into one block a call",
        note="torch scaled_dot_product_attention",
    )


def _triton(phase: str) -> Kernel:
    fields: dict[str, Constraint] = {
        **_FIELDS,
        "kv_lora_rank": OneOf(512, 16, 32, 64, 128, 256),
        "qk_rope_head_dim": OneOf(64, 16, 32, 48, 80, 96, 112, 128),
        "dtype": OneOf("bfloat16", "float16", "float32"),
        "kv_dtype": Either(SameAs("dtype"), OneOf(*FP8_DTYPES)),
        "max_q_len": Range(1, 16, (4,)),
        "graph": _FLAG,
    }
    return Kernel(
        name=f"triton.mla_{phase}",
        op="mla_attention",
        phase=phase,
        target=f"hal_ops.mla_attention.triton_mla:{phase}",
        priority=Band.PORTABLE + 50,
        capabilities=frozenset({"triton"}),
        needs=(TORCH, TRITON),
        fields=fields,
        check=cache_format,
        evidence=_EVIDENCE,
    )


KERNELS = tuple(make(phase) for phase in PHASES for make in (_reference, _torch, _torch_cpu, _triton))
"""Both phases of latent attention: the reference and torch anywhere, torch's own on the CPU, and Triton."""
