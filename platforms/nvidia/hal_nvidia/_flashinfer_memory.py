"""The memory that flashinfer's functions of TensorRT-LLM and cuDNN work in: which of them may share it, and which not.

Some count on zeros at the front of their buffer and leave zeros there: xqa, for its semaphores, and trtllm-gen's decode
before 0.6.15, for its counters. The others leave anything there: cuDNN, trtllm-gen's extend, whose statistics begin at
the front, and its decode since 0.6.15, whose counters are a buffer of their own. So each kind has a buffer of its own,
one a stream. A plan that graphs may hold has all of its own, since a replay may run beside any other call.

A function that takes a counter buffer makes one and zeroes it in every call that brings none (flashinfer#3949). The
kernels leave it zero; calls that overlap may not share it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_ops.attention import AttentionRequest, Step
from hal_ops.mla_attention import MlaAttentionRequest

__all__ = ["Memory", "Workplace"]

_MIB = 1 << 20
_COUNTERS = "multi_ctas_kv_counter_buffer"
_FEWEST_COUNTERS = _MIB
_STATISTICS = 256
"""Queries that the statistics of a row are rounded up to, where the LSE is asked for (``softmax_slots``)."""
_SPLIT_ROWS = 4 * 128
"""Partial results a multiprocessor: up to four blocks of as many rows as a tile has (0.7.4, ``fmhaKernels.cuh``)."""


@dataclasses.dataclass(slots=True)
class Memory:
    """What a plan's calls work in, uint8. ``counters``: zeros, for functions that take them beside the buffer."""

    buffer: Tensor
    counters: Tensor | None = None

    def keywords(self) -> dict[str, Tensor]:
        """The counters as an argument, for functions that take them."""
        return {} if self.counters is None else {_COUNTERS: self.counters}


class Workplace:
    """Gives plans their memory.

    Args:
        zeroed: ``function`` counts on zeros at the front of its buffer, unless it takes counters.
        splits: it leaves partial results in its buffer.
    """

    def __init__(
        self,
        request: AttentionRequest | MlaAttentionRequest,
        device: hal.Device,
        function: Callable[..., Any],
        *,
        zeroed: bool = False,
        splits: bool = True,
    ) -> None:
        self._place = device.torch_device()
        self._processors = device.multiprocessors or pool.MOST_PROCESSORS
        self._heads = request.num_q_heads
        self._lse = request.return_lse
        self._graph = request.graph
        self._width = request.kv_lora_rank if isinstance(request, MlaAttentionRequest) else request.v_head_dim
        self._counted = _COUNTERS in inspect.signature(function).parameters
        self._zeroed = zeroed and not self._counted
        self._splits = splits

    def plan(self, step: Step) -> Memory:
        """That of the current stream, or where graphs may hold the plan, its own.

        Raises:
            WorkspaceError: the pool is frozen, and too small.
        """
        size = self._size(step)
        count = 4 * -(-max(step.batch * self._heads, self._processors) // 8) * 8
        if self._graph:
            return Memory(self._own(size), self._empty(count).zero_() if self._counted else None)
        stream = pool.stream_of(self._place)
        take = pool.zeroed if self._zeroed else pool.for_functions
        counters = None
        if self._counted:
            counters = pool.counters(self._place, stream, max(count, _FEWEST_COUNTERS))
        return Memory(take(self._place, stream, size), counters)

    def update(self, step: Step, payload: Memory) -> Memory:
        """The memory of the same plan for another step: graphs hold its addresses."""
        return payload if self._graph else self.plan(step)

    def _size(self, step: Step) -> int:
        """Bytes that the calls of a plan may need: the zeros, partial results, and for an LSE a maximum and a sum of each
        query that a row may have, with what the library keeps behind them."""
        size = (pool.ZEROED if self._zeroed else 0) + _MIB
        if self._splits:
            size += self._processors * _SPLIT_ROWS * (2 * self._width + 8)
        if self._lse:
            queries = -(-max(1, step.max_q_len) // _STATISTICS) * _STATISTICS
            size += 8 * self._heads * step.batch * queries + _MIB
        return size

    def _own(self, size: int) -> Tensor:
        buffer = self._empty(size)
        if self._zeroed:
            buffer[: pool.ZEROED].zero_()
        return buffer

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._place)
