"""``MLA_ATTENTION``: the op's declaration. Needs no torch."""

from __future__ import annotations

from hal_ops._op import Op
from hal_ops.mla_attention.request import PHASES, MlaAttentionRequest

__all__ = ["MLA_ATTENTION"]

MLA_ATTENTION = Op(
    name=MlaAttentionRequest.op,
    summary="multi-head latent attention, absorbed: extend and decode over a paged cache of latents",
    request=MlaAttentionRequest,
    phases=PHASES,
    keywords=dict.fromkeys(PHASES, ("kv_scale", "return_lse")),
    attributes=dict.fromkeys(PHASES, ("plan",)),
    reference={phase: f"hal_ops.mla_attention.reference:{phase}" for phase in PHASES},
    cases="hal_ops.mla_attention.cases:make_case",
)
