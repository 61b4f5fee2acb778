"""``ATTENTION``: the op's declaration. Needs no torch."""

from __future__ import annotations

from hal_ops._op import Op
from hal_ops.attention.request import PHASES, AttentionRequest

__all__ = ["ATTENTION"]

_PREFILL = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "sinks",
    "alibi_slopes",
    "return_lse",
)
_PAGED = ("sinks", "alibi_slopes", "k_scale", "v_scale", "return_lse")

ATTENTION = Op(
    name="attention",
    summary="softmax(q k^T) v: prefill without a cache, extend and decode over a paged cache",
    request=AttentionRequest,
    phases=PHASES,
    keywords={"prefill": _PREFILL, "extend": _PAGED, "decode": _PAGED},
    attributes={"extend": ("plan",), "decode": ("plan",)},
    reference={phase: f"hal_ops.attention.reference:{phase}" for phase in PHASES},
    cases="hal_ops.attention.cases:make_case",
)
