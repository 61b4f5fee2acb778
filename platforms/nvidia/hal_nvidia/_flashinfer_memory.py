"""The memory that flashinfer's functions of TensorRT-LLM and cuDNN work in: which of them may share it, and which not.

Some count on zeros at the front of their buffer and leave zeros there: xqa, for its semaphores, and trtllm-gen's decode
before 0.6.15, for its counters. The others leave anything there: cuDNN, trtllm-gen's extend, whose statistics begin at
the front, and its decode since 0.6.15, whose counters are a buffer of their own. So each kind has a buffer of its own,
one a stream.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_ops.attention import AttentionRequest, Step
from hal_ops.mla_attention import MlaAttentionRequest

__all__ = ["Memory", "Workplace"]

_MIB = 1 << 20
_COUNTERS = "multi_ctas_kv_counter_buffer"
_STATISTICS = 256
"""Queries that the statistics of a row are rounded up to, where the LSE is asked for (``softmax_slots``)."""


@dataclasses.dataclass(slots=True)
class Memory:
    """What a plan's calls work in, uint8."""

    buffer: Tensor


class Workplace:
    """Gives plans their memory.

    Args:
        zeroed: ``function`` counts on zeros at the front of its buffer, unless it takes counters.
    """

    def __init__(
        self,
        request: AttentionRequest | MlaAttentionRequest,
        device: hal.Device,
        function: Callable[..., Any],
        *,
        zeroed: bool = False,
    ) -> None:
        self._place = device.torch_device()
        self._heads = request.num_q_heads
        self._lse = request.return_lse
        self._zeroed = zeroed and _COUNTERS not in inspect.signature(function).parameters

    def plan(self, step: Step) -> Memory:
        """That of the current stream.

        Raises:
            WorkspaceError: the pool is frozen, and too small.
        """
        take = pool.zeroed if self._zeroed else pool.for_functions
        return Memory(take(self._place, pool.stream_of(self._place), self._statistics(step)))

    def _statistics(self, step: Step) -> int:
        """Bytes for a maximum and a sum of each query that a row may have, and what the library keeps behind them."""
        if not self._lse:
            return 0
        queries = -(-max(1, step.max_q_len) // _STATISTICS) * _STATISTICS
        return 8 * self._heads * step.batch * queries + _MIB
