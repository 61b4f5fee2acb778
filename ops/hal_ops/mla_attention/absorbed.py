"""Latent attention by any implementation of paged attention that takes its dims: multi-query attention over views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hal_ops.attention.contract import PagedAttention, Step
from hal_ops.mla_attention.contract import MlaAttention

__all__ = ["over"]


def over(paged: PagedAttention, rank: int) -> MlaAttention:
    """``paged``, made for the absorbed request, given the cache as one head of keys whose first ``rank`` are values."""
    return _Over(paged, rank)


class _Over:
    def __init__(self, paged: PagedAttention, rank: int) -> None:
        self._paged = paged
        self._rank = rank

    def plan(self, step: Step) -> Any:
        return self._paged.plan(step)

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Any,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        keys = cache.unsqueeze(2)
        return self._paged(
            q, keys, keys[..., : self._rank], step, payload, k_scale=kv_scale, v_scale=kv_scale, return_lse=return_lse
        )
