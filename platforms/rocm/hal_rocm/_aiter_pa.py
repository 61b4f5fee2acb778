"""aiter's ``paged_attention_rocm`` behind the contract of decode; see :mod:`hal_rocm.aiter_pa_kernels`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest, Step
from hal_ops.skipping import repeating

__all__ = ["decode"]

_PARTITION = 256
"""Keys that a work group takes."""
_LEAD = 256
"""Elements before the scratch: for a row without keys, the last of no partitions is looked up at -1."""


def decode(request: AttentionRequest, device: hal.Device) -> Decode:
    """The decode phase, up to four queries a row."""
    attention = importlib.import_module("aiter.ops.attention")
    return Decode(request, device.torch_device(), attention.paged_attention_rocm)


@dataclasses.dataclass
class Tails:
    """What lies behind the last tokens of a step's rows, in their last pages.

    Fields:
        pages: int64 ``[rows]``, last pages; a row without keys repeats another row's.
        behind: bool ``[rows, 1, 1, page_size]``, slots past the end.
    """

    pages: Tensor
    behind: Tensor

    @classmethod
    def of(cls, step: Step) -> Tails:
        device, size = step.kv_lens.device, step.page_size
        last = step.kv_lens.long() - 1
        rows, some = repeating(last)
        last = last[rows].clamp_min(0)
        pages = torch.where(some, step.block_table[rows, last // size].long(), 0)
        behind = (torch.arange(size, device=device) > (last % size)[:, None]) & some
        return cls(pages, behind[:, None, None])

    @contextlib.contextmanager
    def finite(self, v_cache: Tensor) -> Iterator[None]:
        """Inside, what is not finite there is 0: numbers may be tokens of another row that shares the page."""
        held = v_cache[self.pages]
        v_cache[self.pages] = torch.where(self.behind, held.nan_to_num(0.0, 0.0, 0.0), held)
        try:
            yield
        finally:
            v_cache[self.pages] = held


@dataclasses.dataclass
class Rows:
    """One step, and the scratch of its calls.

    Fields:
        q_len: queries a row. longest: keys that a row may have.
        table: int32 ``[rows, max_pages]``, contiguous. tails: see there.
        keyless: bool ``[rows]``, or None where all rows have keys.
        sums, tops, parts: each partition's sum, largest logit and output.
    """

    q_len: int
    longest: int
    table: Tensor
    tails: Tails
    keyless: Tensor | None
    sums: Tensor
    tops: Tensor
    parts: Tensor


class Decode:
    """``paged_attention_rocm``."""

    def __init__(self, request: AttentionRequest, device: torch.device, function: Callable[..., Any]) -> None:
        self._request = request
        self._function = function
        self._dtype = getattr(torch, request.dtype)
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        """Scales have to be given, also where the cache is not FP8."""

    def plan(self, step: Step) -> Rows | None:
        """The step's last pages, and its own scratch; None for one without keys. Waits for nothing."""
        graph = self._request.graph
        longest = step.block_table.shape[1] * step.page_size if graph else step.max_kv_len
        if not longest or not step.batch:
            return None
        q_len = max(1, step.max_q_len)
        shape = (step.batch * q_len, self._request.num_q_heads, math.ceil(longest / _PARTITION))
        return Rows(
            q_len=q_len,
            longest=longest,
            table=step.block_table.contiguous(),
            tails=Tails.of(step),
            keyless=step.kv_lens == 0 if graph or 0 in step.kv_lens_host else None,
            sums=self._scratch(torch.float32, *shape),
            tops=self._scratch(torch.float32, *shape),
            parts=self._scratch(self._dtype, *shape, self._request.head_dim),
        )

    def update(self, step: Step, payload: Rows | None) -> Rows | None:
        """The same for another step, in the same memory if the plan is for graphs."""
        if payload is None or not self._request.graph:
            return self.plan(step)
        tails = Tails.of(step)
        payload.tails.pages.copy_(tails.pages)
        payload.tails.behind.copy_(tails.behind)
        if payload.keyless is not None:
            payload.keyless.copy_(step.kv_lens == 0)
        return payload

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Rows | None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        """Sinks, scales and ``return_lse`` are not declared, so nobody brings or asks for them."""
        out = q.new_empty(q.shape)
        rows = 0 if payload is None else min(q.shape[0] // payload.q_len, step.batch)
        if payload is None or not rows:
            return out.zero_()
        _check_strides(k_cache, v_cache)
        tokens = rows * payload.q_len
        with payload.tails.finite(v_cache):
            self._function(
                out[:tokens],
                payload.sums,
                payload.tops,
                payload.parts,
                (q if q.stride(1) == q.shape[2] else q.contiguous())[:tokens],  # declared in Kernel.copies
                k_cache,
                v_cache,
                self._request.num_kv_heads,
                self._request.softmax_scale,
                payload.table[:rows],
                step.kv_lens[:rows],
                step.page_size,
                payload.longest,
                alibi_slopes,
                "auto",
                self._one,
                self._one,
                None,
                _PARTITION,
                payload.q_len,
            )
        if payload.keyless is not None:
            without = payload.keyless[:rows].repeat_interleave(payload.q_len)
            out[:tokens].masked_fill_(without[:, None, None], 0.0)
        return out

    def _scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self._one.new_empty(_LEAD + math.prod(shape), dtype=dtype)[_LEAD:].view(shape)


def _check_strides(k_cache: Tensor, v_cache: Tensor) -> None:
    """Pages and heads of V are looked for by K's strides."""
    for dim, what in enumerate(("pages", "heads")):
        if k_cache.shape[dim] > 1 and k_cache.stride(dim) != v_cache.stride(dim):
            raise ValueError(
                f"the {what} of K are {k_cache.stride(dim)} elements apart, those of V {v_cache.stride(dim)}: aiter "
                "finds both by K's strides; use allocate_kv_cache(), or another kernel"
            )
