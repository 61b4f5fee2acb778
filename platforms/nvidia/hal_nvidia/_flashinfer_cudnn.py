"""cuDNN's paged kernels, as flashinfer offers them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import hal
from hal_nvidia._flashinfer_functions import Caches, Paged, flashinfer
from hal_nvidia._flashinfer_memory import Memory
from hal_ops.attention import AttentionRequest, Step

__all__ = ["flashinfer_cudnn_decode", "flashinfer_cudnn_extend"]


def flashinfer_cudnn_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``cudnn_batch_decode_with_kv_cache``."""
    return _Cudnn(request, device, flashinfer("cudnn").cudnn_batch_decode_with_kv_cache)


def flashinfer_cudnn_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``cudnn_batch_prefill_with_kv_cache``."""
    return _CudnnExtend(request, device, flashinfer("cudnn").cudnn_batch_prefill_with_kv_cache)


class _Cudnn(Paged):
    """Lengths are ``[rows, 1, 1, 1]``, and rows are counted by q: those that make up a plan's size are left out. The bound
    on the keys is the block table's, whatever the step holds."""

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        rows = step.num_tokens // step.max_q_len
        q, whole_out, out = self._first(q, step.num_tokens)
        found = self._function(
            q,
            *caches,
            scale,
            memory.buffer,
            max_sequence_kv=step.block_table.shape[1] * step.page_size,
            actual_seq_lens_kv=step.kv_lens[:rows].view(-1, 1, 1, 1),
            block_tables=step.block_table[:rows],
            out=out,
            q_len_per_req=step.max_q_len,
            window_left=self._left,
        )
        return found if whole_out is None else whole_out


class _CudnnExtend(Paged):
    """Offsets are in tokens if that is said. What comes back is a pair, with or without an LSE."""

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        out, _ = self._function(
            q,
            *caches,
            scale,
            memory.buffer,
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
