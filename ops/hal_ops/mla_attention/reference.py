"""The oracle: latent attention by attention's own oracle, on the absorbed request. Any device."""

from __future__ import annotations

import torch

from hal_ops.attention import reference
from hal_ops.mla_attention.absorbed import over
from hal_ops.mla_attention.contract import MlaAttention
from hal_ops.mla_attention.request import MlaAttentionRequest

__all__ = ["decode", "extend"]


def extend(
    request: MlaAttentionRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> MlaAttention:
    """The extend phase. ``rounded=False`` leaves the output in ``accumulate``."""
    paged = reference.extend(request.absorbed(), device, accumulate=accumulate, rounded=rounded)
    return over(paged, request.kv_lora_rank)


def decode(
    request: MlaAttentionRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> MlaAttention:
    """The decode phase: the same as :func:`extend`."""
    return extend(request, device, accumulate=accumulate, rounded=rounded)
