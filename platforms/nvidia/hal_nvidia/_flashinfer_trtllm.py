"""TensorRT-LLM's and cuDNN's paged kernels, as flashinfer offers them: functions of a block table and device lengths.

They plan nothing. What ``plan`` gives is their work buffer, one a stream; they count on its being zero at first.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._fp8_query import quantizer
from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest, Step

__all__ = [
    "flashinfer_cudnn_decode",
    "flashinfer_cudnn_extend",
    "trtllm_gen_decode",
    "trtllm_gen_extend",
    "xqa_decode",
]

_LN_2 = math.log(2.0)


def trtllm_gen_extend(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``trtllm_batch_context_with_kv_cache``."""
    return _TrtllmExtend(request, device, _flashinfer("prefill").trtllm_batch_context_with_kv_cache)


def trtllm_gen_decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``trtllm_batch_decode_with_kv_cache``."""
    return _TrtllmDecode(request, device, _flashinfer("decode").trtllm_batch_decode_with_kv_cache)


def xqa_decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``xqa_batch_decode_with_kv_cache``."""
    return _Xqa(request, device, _flashinfer("decode").xqa_batch_decode_with_kv_cache)


def flashinfer_cudnn_decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``cudnn_batch_decode_with_kv_cache``."""
    return _Cudnn(request, device, _flashinfer("cudnn").cudnn_batch_decode_with_kv_cache)


def flashinfer_cudnn_extend(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``cudnn_batch_prefill_with_kv_cache``."""
    return _CudnnExtend(request, device, _flashinfer("cudnn").cudnn_batch_prefill_with_kv_cache)


def _flashinfer(module: str) -> Any:
    return importlib.import_module(f"flashinfer.{module}")


class _Paged:
    """A paged phase. Subclasses map the contract's arguments onto ``function`` in :meth:`_attend`."""

    def __init__(self, request: AttentionRequest, device: hal.Device, function: Any) -> None:
        self._function = function
        self._place = device.torch_device()
        self._scale = request.softmax_scale
        self._layout = request.kv_layout
        self._left = -1 if request.window[0] is None else request.window[0]
        self._causal = request.causal
        self._dtype = torch_dtype(request.dtype)
        self._quantize: Any = None

    def plan(self, step: Step) -> Tensor:
        """The work buffer of the current stream."""
        return pool.zeroed_scratch(self._place, pool.stream_of(self._place))

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        q = q.contiguous()  # they read q by its shape alone; declared in Kernel.copies
        scale = self._scale if k_scale is None else k_scale * self._scale
        if self._quantize is not None:
            q, q_scale = self._quantize(q)
            scale = q_scale * scale
        found = self._attend(q, (k_cache, v_cache), step, payload, sinks, scale, v_scale, return_lse)
        return (found[0], found[1].mul_(_LN_2)) if return_lse else found

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        raise NotImplementedError


class _Trtllm(_Paged):
    """Queries go over an FP8 cache as they are, where the request does not permit FP8 ones. The output's format is said."""

    def __init__(self, request: AttentionRequest, device: hal.Device, function: Any) -> None:
        super().__init__(request, device, function)
        if request.fp8_query and is_fp8(request.kv_dtype):
            self._quantize = quantizer(request, device)


class _TrtllmExtend(_Trtllm):
    """Cumulative lengths are in tokens, those of the keys too."""

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        return self._function(
            q,
            caches,
            buffer,
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
        )


class _TrtllmDecode(_Trtllm):
    """Query lengths are passed as cumulative ones: rows that make up a plan's size have none."""

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        return self._function(
            q,
            caches,
            buffer,
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
        )


class _Xqa(_Paged):
    """One query a row: rows are counted by ``q``. The layout's default is NHD here, and HND next door."""

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        rows, whole = q.shape[0], q.shape[0] == step.batch
        return self._function(
            q,
            caches,
            buffer,
            step.block_table if whole else step.block_table[:rows],
            step.kv_lens if whole else step.kv_lens[:rows],
            max_seq_len=step.max_kv_len,
            bmm1_scale=scale,
            bmm2_scale=1.0 if v_scale is None else v_scale,
            window_left=self._left,
            sinks=sinks,
            kv_layout=self._layout,
            q_len_per_req=1,
        )


class _Cudnn(_Paged):
    """Lengths are ``[rows, 1, 1, 1]``. The bound on the keys is the block table's, whatever the step holds."""

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        return self._function(
            q,
            *caches,
            scale,
            buffer,
            max_sequence_kv=step.block_table.shape[1] * step.page_size,
            actual_seq_lens_kv=step.kv_lens.view(-1, 1, 1, 1),
            block_tables=step.block_table,
            q_len_per_req=q.shape[0] // step.batch,
            window_left=self._left,
        )


class _CudnnExtend(_Paged):
    """Offsets are in tokens if that is said. What comes back is a pair, with or without an LSE."""

    def _attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        buffer: Tensor,
        sinks: Tensor | None,
        scale: float | Tensor,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> Any:
        out, _ = self._function(
            q,
            *caches,
            scale,
            buffer,
            max_token_per_sequence=step.max_q_len,
            max_sequence_kv=step.block_table.shape[1] * step.page_size,
            actual_seq_lens_q=step.cu_seqlens_q.diff().view(-1, 1, 1, 1),
            actual_seq_lens_kv=step.kv_lens.view(-1, 1, 1, 1),
            block_tables=step.block_table,
            causal=self._causal,
            return_lse=False,
            batch_offsets_q=step.cu_seqlens_q,
            batch_offsets_units="tokens",
        )
        return out
