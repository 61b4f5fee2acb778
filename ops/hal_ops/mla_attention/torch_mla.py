"""Latent attention on the CPU by torch's own attention, on the absorbed request; see :mod:`.attention.torch_sdpa`.

What the factories honour: any heads and dims; float64, float32, bfloat16, float16, and a cache of any of these or in FP8
with its scale; any page size; any ``max_q_len``; causal or not; any scale; LSE; deterministic. Not graphs.
"""

from __future__ import annotations

from hal_ops.attention import torch_sdpa
from hal_ops.mla_attention.absorbed import over
from hal_ops.mla_attention.contract import MlaAttention
from hal_ops.mla_attention.request import MlaAttentionRequest

__all__ = ["decode", "extend"]


def extend(request: MlaAttentionRequest, device: object) -> MlaAttention:
    """The extend phase.

    Raises:
        ValueError: a dtype or an option that this does not do.
    """
    return over(torch_sdpa.extend(request.absorbed(), device), request.kv_lora_rank)


def decode(request: MlaAttentionRequest, device: object) -> MlaAttention:
    """The decode phase.

    Raises:
        ValueError: a dtype or an option that this does not do.
    """
    return over(torch_sdpa.decode(request.absorbed(), device), request.kv_lora_rank)
