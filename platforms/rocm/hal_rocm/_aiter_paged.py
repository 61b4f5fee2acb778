"""aiter's kernels over pages of one token: lengths and places of all rows as one list (CSR)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops.attention import AttentionRequest, Step
from hal_rocm._shared import mask_of, nothing, settled
from hal_rocm._slots import gap_of, respaced, slots, tokens

__all__ = ["Decode", "Extend"]

_PARTITION = 256
"""Keys that a work group of ``paged_attention_ragged`` takes."""
_SPARE = 256
"""Places behind the last one that a tile of keys may read."""
_LEAD = 256
"""Bytes before the scratch: for a row without keys, the last of no partitions is looked up at -1."""


@dataclasses.dataclass
class Places:
    """Where the tokens of all rows lie, and for decode the scratch of the call.

    Fields:
        indptr: int32 ``[batch + 1]``. page_size: of the cache. partitions, scratch: of ``paged_attention_ragged``.
        by_gap: int32 places, by the distance of two pages in tokens. The one for ``page_size`` is always there.
    """

    indptr: Tensor
    page_size: int
    by_gap: dict[int, Tensor]
    partitions: int = 0
    scratch: Tensor | None = None

    @classmethod
    def of(cls, step: Step, room: int) -> Places:
        found = slots(step, step.block_table.new_empty(room + _SPARE))
        return cls(step.cu_seqlens_k, step.page_size, {step.page_size: found})

    def at(self, gap: int) -> Tensor:
        if gap not in self.by_gap:
            self.by_gap[gap] = respaced(self.by_gap[self.page_size], self.page_size, gap)
        return self.by_gap[gap]

    def refill(self, step: Step) -> None:
        """The places of another step, in the same memory."""
        found = slots(step, self.by_gap[self.page_size])
        for gap, places in self.by_gap.items():
            if places is not found:
                places.copy_(respaced(found, self.page_size, gap))


class Extend:
    """``mha_batch_prefill_func``."""

    def __init__(self, request: AttentionRequest, function: Callable[..., Any]) -> None:
        self._request = request
        self._function = function
        self._told = {
            **mask_of(request),
            "softmax_scale": request.softmax_scale,
            "logits_soft_cap": request.softcap,
        }

    def plan(self, step: Step) -> Places:
        """The places of the step's tokens. Waits for nothing."""
        return Places.of(step, sum(step.kv_lens_host))

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Places,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if not q.shape[0]:
            out, lse = nothing(q, self._request, sinks, return_lse)
            return (out, lse) if return_lse else out
        gap = gap_of(k_cache, v_cache)
        found = self._function(
            q,
            tokens(k_cache, gap),
            tokens(v_cache, gap),
            step.cu_seqlens_q,
            payload.indptr,
            payload.at(gap),
            step.max_q_len,
            step.max_kv_len,
            **self._told,
            alibi_slopes=alibi_slopes,
            return_lse=return_lse,
            sink_ptr=sinks,
        )
        return (found[0], settled(found[1]).t()) if return_lse else found


class Decode:
    """``paged_attention_ragged``: one query a row."""

    def __init__(self, request: AttentionRequest, device: torch.device, function: Callable[..., Any]) -> None:
        self._request = request
        self._function = function
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        """Scales have to be given, also where the cache is not FP8."""

    def plan(self, step: Step) -> Places:
        """The places of the step's tokens, and its own scratch: two plans never share one. Waits for nothing."""
        room = step.block_table.numel() * step.page_size if self._request.graph else sum(step.kv_lens_host)
        made = Places.of(step, room)
        made.partitions = max(1, math.ceil(step.max_kv_len / _PARTITION))
        made.scratch = self._scratch(step, made.partitions)
        return made

    def update(self, step: Step, payload: Places) -> Places:
        """The same for another step, in the same memory if the plan is for graphs."""
        if not self._request.graph:
            return self.plan(step)
        payload.refill(step)
        return payload

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Places,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        request = self._request
        out = q.new_empty(q.shape)
        rows = min(q.shape[0], step.batch)
        if rows:
            queries = q if q.stride(1) == request.head_dim else q.contiguous()  # declared in Kernel.copies
            gap = gap_of(k_cache, v_cache)
            self._function(
                out[:rows],
                payload.scratch,
                queries[:rows],
                tokens(k_cache, gap).unsqueeze(1),
                tokens(v_cache, gap).unsqueeze(1),
                request.softmax_scale,
                payload.indptr,
                payload.at(gap),
                None,
                1,
                payload.partitions,
                alibi_slopes,
                "auto",
                "NHD",
                request.softcap,
                self._one,
                self._one,
                None,
                _PARTITION,
            )
        return out

    def _scratch(self, step: Step, partitions: int) -> Tensor:
        """Each partition's output in the query's format, its largest logit and its sum."""
        cells = max(1, step.batch) * self._request.num_q_heads * partitions
        return self._one.new_empty(_LEAD + cells * (self._request.head_dim * 2 + 8), dtype=torch.uint8)[_LEAD:]
