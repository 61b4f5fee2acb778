"""TensorRT-LLM's paged kernels, as flashinfer offers them: trtllm-gen and xqa."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import hal
from hal_nvidia._flashinfer_functions import Caches, Paged, flashinfer
from hal_nvidia._flashinfer_memory import Memory
from hal_nvidia._fp8_query import quantizer
from hal_nvidia._grid import refuse_wide
from hal_ops import is_fp8
from hal_ops.attention import AttentionRequest, Step

__all__ = ["trtllm_gen_decode", "trtllm_gen_extend", "xqa_decode"]


def trtllm_gen_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``trtllm_batch_context_with_kv_cache``."""
    function = flashinfer("prefill").trtllm_batch_context_with_kv_cache
    return _TrtllmExtend(request, device, function, splits=False)


def trtllm_gen_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``trtllm_batch_decode_with_kv_cache``."""
    function = flashinfer("decode").trtllm_batch_decode_with_kv_cache
    return _TrtllmDecode(request, device, function, zeroed=True)


def xqa_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``xqa_batch_decode_with_kv_cache``."""
    return _Xqa(request, device, flashinfer("decode").xqa_batch_decode_with_kv_cache, zeroed=True)


class _Trtllm(Paged):
    """Queries go over an FP8 cache as they are, where the request does not permit FP8 ones. The output's format is said."""

    def __init__(
        self, request: AttentionRequest, device: hal.Device, function: Any, *, zeroed: bool = False, splits: bool = True
    ) -> None:
        super().__init__(request, device, function, zeroed=zeroed, splits=splits)
        if request.fp8_query and is_fp8(request.kv_dtype):
            self._quantize = quantizer(request, device)


class _TrtllmExtend(_Trtllm):
    """Cumulative lengths are in tokens, those of the keys too."""

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        return self._function(
            q,
            caches,
            memory.buffer,
            step.block_table,
            step.kv_lens,
            max_q_len=step.max_q_len,
            max_kv_len=step.max_kv_len,
            bmm1_scale=scale,
            bmm2_scale=1.0 if v_scale is None else v_scale,
            batch_size=step.batch,
            cum_seq_lens_q=step.cu_seqlens_q,
            cum_seq_lens_kv=step.cu_seqlens_k,
            window_left=self._left,
            out_dtype=self._dtype,
            kv_layout=self._layout,
            sinks=sinks,
            return_lse=return_lse,
            **memory.keywords(),
        )


class _TrtllmDecode(_Trtllm):
    """Query lengths are passed as cumulative ones: rows that make up a plan's size have none."""

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        return self._function(
            q,
            caches,
            memory.buffer,
            step.block_table,
            step.kv_lens,
            max_seq_len=step.max_kv_len,
            bmm1_scale=scale,
            bmm2_scale=1.0 if v_scale is None else v_scale,
            window_left=self._left,
            out_dtype=self._dtype,
            sinks=sinks,
            kv_layout=self._layout,
            backend="trtllm-gen",
            q_len_per_req=None,
            max_q_len=step.max_q_len,
            cum_seq_lens_q=step.cu_seqlens_q,
            return_lse=return_lse,
            **memory.keywords(),
        )


class _Xqa(Paged):
    """One query a row: rows are counted by q. The layout's default is NHD here, and HND next door."""

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        rows, table, lens, whole_out, out = step.batch, step.block_table, step.kv_lens, None, None
        refuse_wide(rows, "xqa")
        if q.shape[0] != rows:
            rows = min(q.shape[0], rows)
            table, lens = table[:rows], lens[:rows]
            q, whole_out, out = self._first(q, rows)
        found = self._function(
            q,
            caches,
            memory.buffer,
            table,
            lens,
            max_seq_len=step.max_kv_len,
            bmm1_scale=scale,
            bmm2_scale=1.0 if v_scale is None else v_scale,
            window_left=self._left,
            out=out,
            sinks=sinks,
            kv_layout=self._layout,
            q_len_per_req=1,
        )
        return found if whole_out is None else whole_out
