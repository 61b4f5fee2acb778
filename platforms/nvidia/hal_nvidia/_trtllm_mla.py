"""flashinfer's ``trtllm_batch_decode_with_kv_cache_mla`` behind the contract of latent attention: decode alone.

It plans nothing. What a plan holds is what its calls work in, and the block table in a width that it takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia._flash import nothing
from hal_nvidia._flashinfer_memory import Memory, Workplace
from hal_nvidia._fp8_query import quantizer
from hal_ops import is_fp8
from hal_ops.attention import Step
from hal_ops.mla_attention import MlaAttention, MlaAttentionRequest

__all__ = ["decode"]

_LN_2 = math.log(2.0)
_TABLE_TOKENS = 128
"""Tokens that a block table's width is a multiple of (``_check_trtllm_gen_mla_shape``)."""


def decode(request: MlaAttentionRequest, device: hal.Device) -> MlaAttention:
    """The decode phase: as many queries in each row."""
    return _Decode(request, device, importlib.import_module("flashinfer.mla").trtllm_batch_decode_with_kv_cache_mla)


@dataclasses.dataclass(slots=True)
class Work:
    """``tokens``: of the step's rows, ``queries`` each. table: int32, of a width that is taken."""

    tokens: int
    queries: int
    memory: Memory
    table: Tensor


class _Decode:
    def __init__(self, request: MlaAttentionRequest, device: hal.Device, function: Any) -> None:
        self._function = function
        self._memory = Workplace(request, device, function, zeroed=True)
        self._rank = request.kv_lora_rank
        self._told = {
            "qk_nope_head_dim": request.qk_nope_head_dim,
            "kv_lora_rank": request.kv_lora_rank,
            "qk_rope_head_dim": request.qk_rope_head_dim,
            "backend": "trtllm-gen",
        }
        self._scale = request.softmax_scale
        self._quantize: Any = quantizer(request.absorbed(), device) if is_fp8(request.kv_dtype) else None

    def plan(self, step: Step) -> Work:
        """The work memory of the current stream, and the block table. Waits for nothing."""
        missing = -step.block_table.shape[1] % max(1, _TABLE_TOKENS // step.page_size)
        tokens = sum(step.q_lens)
        return Work(
            tokens=tokens,
            queries=max(1, step.max_q_len),
            memory=self._memory.plan(step),
            table=functional.pad(step.block_table, (0, missing)) if missing else step.block_table,
        )

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Work,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        tokens = payload.tokens
        if q.shape[0] != tokens or not tokens:
            return self._padded(q, cache, step, payload, kv_scale, return_lse)
        rows = tokens // payload.queries
        scale: float | Tensor = self._scale if kv_scale is None else kv_scale * self._scale
        q = q.contiguous()  # declared in Kernel.copies
        if self._quantize is not None:
            q, q_scale = self._quantize(q, step)
            scale = q_scale * scale
        found = self._function(
            q.view(rows, payload.queries, *q.shape[1:]),
            cache,
            payload.memory.buffer,
            block_tables=payload.table[:rows],
            seq_lens=step.kv_lens[:rows],
            max_seq_len=step.max_kv_len,
            bmm1_scale=scale,
            bmm2_scale=1.0 if kv_scale is None else kv_scale,
            return_lse=return_lse,
            **payload.memory.keywords(),
            **self._told,
        )
        out = (found[0] if return_lse else found).view(tokens, q.shape[1], self._rank)
        return (out, found[1].view(tokens, q.shape[1]).mul_(_LN_2)) if return_lse else out

    def _padded(
        self, q: Tensor, cache: Tensor, step: Step, payload: Work, kv_scale: Tensor | None, return_lse: bool
    ) -> Any:
        """A call with tokens beside those of the step's rows, which come last and see no key."""
        if q.shape[0] < payload.tokens:
            raise ValueError(f"q has {q.shape[0]} tokens, and the plan is for {payload.tokens}")
        whole = nothing(q, self._rank, return_lse)
        if payload.tokens:
            part = self(q[: payload.tokens], cache, step, payload, kv_scale=kv_scale, return_lse=return_lse)
            pairs = zip(whole, part, strict=True) if return_lse else [(whole, part)]
            for into, found in pairs:
                into[: payload.tokens] = found
        return whole
