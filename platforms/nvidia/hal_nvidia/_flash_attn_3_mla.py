"""flash-attention 3 over a cache of latents: ``flash_attn_with_kvcache`` with ``qv``, the absorbed part of the queries.

Scores are ``softmax_scale * (q . k + qv . v)`` (``hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp``, ``HasQv``): with the rotated
part of an entry as k and its latent as v, that is latent attention, and the latent is read once.

The library plans inside the call, one small kernel a layer: its planner's Python function has no word for ``qv``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flash_attn_interface import flash_attn_with_kvcache
from torch import Tensor

import hal
from hal_nvidia._flash import nothing
from hal_ops.attention import Step
from hal_ops.mla_attention import MlaAttention, MlaAttentionRequest

__all__ = ["decode", "extend"]


def extend(request: MlaAttentionRequest, device: hal.Device) -> MlaAttention:
    """The extend phase."""
    return _Mla(request)


def decode(request: MlaAttentionRequest, device: hal.Device) -> MlaAttention:
    """The decode phase: the same."""
    return _Mla(request)


class _Mla:
    def __init__(self, request: MlaAttentionRequest) -> None:
        self._rank = request.kv_lora_rank
        self._attend = partial(
            flash_attn_with_kvcache,
            softmax_scale=request.softmax_scale,
            causal=request.causal,
            # Only without splits do the sums of a row not depend on the rows beside it.
            num_splits=1 if request.deterministic else 0,
        )

    def plan(self, step: Step) -> int:
        """The bound on query lengths. 0: nothing to do."""
        return step.max_q_len if step.block_table.shape[1] else 0

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: int,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """``kv_scale`` is for FP8 caches, which are not declared, so nobody gives one."""
        rank = self._rank
        if not payload or not q.shape[0]:
            return nothing(q, rank, return_lse)
        entries = cache.unsqueeze(2)
        found = self._attend(
            q[..., rank:], entries[..., rank:], entries[..., :rank], qv=q[..., :rank],
            cache_seqlens=step.kv_lens, page_table=step.block_table, cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=payload, return_softmax_lse=return_lse,
        )  # fmt: skip
        return (found[0], found[1].transpose(0, 1)) if return_lse else found
