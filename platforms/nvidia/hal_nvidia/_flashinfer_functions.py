"""What the paged functions of TensorRT-LLM and cuDNN have in common, as flashinfer offers them: a block table and lengths
on the device. They plan nothing: a plan is the memory that its calls work in."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

import hal
from hal_nvidia._flash import nothing
from hal_nvidia._flashinfer_memory import Memory, Workplace
from hal_ops import torch_dtype
from hal_ops.attention import AttentionRequest, Step

__all__ = ["Caches", "Paged", "flashinfer"]

Caches = tuple[Tensor, Tensor]

_LN_2 = math.log(2.0)


def flashinfer(module: str) -> Any:
    """A module of the library, imported when a kernel is made."""
    return importlib.import_module(f"flashinfer.{module}")


class Paged:
    """A paged phase. Subclasses map the contract's arguments onto ``function`` in :meth:`_attend`.

    Args:
        zeroed, splits: see :class:`Workplace`.
    """

    def __init__(
        self,
        request: AttentionRequest,
        device: hal.Device,
        function: Callable[..., Any],
        *,
        zeroed: bool = False,
        splits: bool = True,
    ) -> None:
        self._function = function
        self._memory = Workplace(request, device, function, zeroed=zeroed, splits=splits)
        self._scale = request.softmax_scale
        self._layout = request.kv_layout
        self._left = -1 if request.window[0] is None else request.window[0]
        self._causal = request.causal
        self._dtype = torch_dtype(request.dtype)
        self._v_head_dim = request.v_head_dim
        self._quantize: Any = None
        self.plan = self._memory.plan
        self.update = self._memory.update

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Memory,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if not q.shape[0] or not step.max_q_len:
            return nothing(q, self._v_head_dim, return_lse)
        q = q.contiguous()  # they read q by its shape alone; declared in Kernel.copies
        scale = self._scale if k_scale is None else k_scale * self._scale
        if self._quantize is not None:
            q, q_scale = self._quantize(q, step)
            scale = q_scale * scale
        found = self._attend(q, (k_cache, v_cache), step, payload, sinks, scale, v_scale, return_lse)
        return (found[0], found[1].mul_(_LN_2)) if return_lse else found

    def _first(self, q: Tensor, used: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens that are of a row; and where there are others, an output with zeros for them, and its first part."""
        if used == q.shape[0]:
            return q, None, None
        out = q.new_empty((*q.shape[:2], self._v_head_dim))
        out[used:] = 0.0
        return q[:used], out, out[:used]

    def _attend(
        self, q: Tensor, caches: Caches, step: Step, memory: Memory, sinks: Tensor | None, scale: float | Tensor,
        v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        raise NotImplementedError
