"""Extend and decode through flashinfer's paged wrappers. Masks, scale, softcap and formats are fixed by ``plan``."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._flashinfer_pool import Lease
from hal_nvidia._flashinfer_reads import refuse_many
from hal_nvidia._flashinfer_tables import Tables, page_tables
from hal_ops import torch_dtype
from hal_ops.attention import AttentionRequest, Step

__all__ = ["Paged", "plan_arguments"]

_LN_2 = math.log(2.0)


class Paged:
    """A paged phase: ``plan`` gives a wrapper planned for the step, the call runs it.

    ``make`` makes a wrapper from a work buffer and keywords; ``arguments`` are the ones of its ``plan`` that stay the
    same. With ``uniform`` each row has one query, and the wrapper takes no query lengths.
    """

    def __init__(
        self,
        request: AttentionRequest,
        device: hal.Device,
        make: functools.partial[Any],
        arguments: Mapping[str, Any],
        *,
        uniform: bool,
    ) -> None:
        self._request = request
        self._device = device
        self._place = device.torch_device()
        self._make = make
        self._arguments = dict(arguments)
        self._uniform = uniform
        self._sinks = request.sinks
        self._scale = request.softmax_scale
        self._narrow = make.keywords["backend"] == "fa2"
        self._compile()

    def plan(self, step: Step) -> Lease:
        """A wrapper of its own for the step. Waits for nothing."""
        tables = self._tables(step)
        taken = self._captured(step, tables) if self._request.graph else self._pooled()
        if tables.tokens:
            self._fill(taken, tables)
        return taken

    def update(self, step: Step, payload: Lease) -> Lease:
        """Plan the same wrapper anew, in place: a captured graph reads its buffers."""
        self._fill(payload, self._tables(step))
        return payload

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Lease,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if q.shape[0] != payload.tokens or not payload.tokens:
            return self._padded(q, k_cache, v_cache, step, payload, sinks, k_scale, v_scale, return_lse)
        if self._narrow and not q.is_contiguous():
            payload.check_reach(q)
        if k_scale is v_scale is None and not return_lse:
            if self._sinks:
                return payload.run(q, (k_cache, v_cache), sinks, self._scale)
            return payload.run(q, (k_cache, v_cache))
        if k_scale is not None:
            q = _times(q, k_scale, torch.empty_like(q))
        extra = (sinks, self._scale) if self._sinks else ()
        found = payload.run(q, (k_cache, v_cache), *extra, return_lse=return_lse)
        if v_scale is not None:
            out = found[0] if return_lse else found
            _times(out, v_scale, out)
        if return_lse:
            found[1].mul_(_LN_2)
        return found

    def _padded(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step, payload: Lease,
        sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        """A call with fewer tokens than its plan of fixed size has room for, or with none."""
        count = q.shape[0]
        if not count:
            out = q.new_empty((0, q.shape[1], self._request.v_head_dim))
            return (out, out.new_empty(out.shape[:2], dtype=torch.float32)) if return_lse else out
        if count > payload.tokens:
            raise ValueError(f"q has {count} tokens, and the plan is for {payload.tokens}")
        whole = functional.pad(q, (0, 0, 0, 0, 0, payload.tokens - count))
        found = self(
            whole, k_cache, v_cache, step, payload, sinks=sinks, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
        )
        return tuple(x[:count] for x in found) if return_lse else found[:count]

    def _tables(self, step: Step) -> Tables:
        room = step.slot_mapping.shape[0]
        tail = not self._uniform and (self._request.graph or room > sum(step.q_lens))
        return page_tables(step, tail=tail)

    def _fill(self, taken: Lease, tables: Tables) -> None:
        lengths = () if self._uniform else (tables.qo_indptr,)
        taken.tokens = tables.tokens
        if self._narrow:
            refuse_many(tables.tokens, self._request.num_q_heads, self._request.head_dim)
        taken.plan(
            lambda wrapper: wrapper.plan(
                *lengths,
                tables.kv_indptr,
                tables.indices,
                tables.last_page_len,
                self._request.num_q_heads,
                self._request.num_kv_heads,
                self._request.head_dim,
                self._request.page_size,
                seq_lens=tables.seq_lens,
                **self._arguments,
            )
        )

    def _pooled(self) -> Lease:
        stream = pool.stream_of(self._place)
        buffer = pool.scratch(self._place, stream, pool.scratch_size(self._request, self._device))
        make = functools.partial(self._make, buffer)
        return pool.lease((*pool.identity(self._make), buffer.data_ptr(), str(self._place), stream), make)

    def _captured(self, step: Step, tables: Tables) -> Lease:
        """A wrapper whose buffers nobody else uses: other graphs may be replayed on other streams."""
        rows = tables.last_page_len.shape[0]
        size = pool.scratch_size(self._request, self._device, tables.tokens, rows)
        buffers = self._buffers(rows, max(1, step.batch * step.block_table.shape[1]))
        return Lease(pool.Held(self._make(self._empty(size, torch.uint8), use_cuda_graph=True, **buffers)))

    def _buffers(self, rows: int, pages: int) -> dict[str, Tensor]:
        names = {"paged_kv_indptr": rows + 1, "paged_kv_indices": pages, "paged_kv_last_page_len": rows}
        if self._uniform:
            return {f"{name}_buffer": self._empty(size) for name, size in names.items()}
        return {f"{n}_buf": self._empty(size) for n, size in {"qo_indptr": rows + 1, **names}.items()}

    def _empty(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._place)

    def _compile(self) -> None:
        """Plan one row: flashinfer compiles the kernel now, where a failure is a reason, and not in the first step."""
        one = torch.ones(1, dtype=torch.int32)
        indptr = torch.tensor([0, 1], dtype=torch.int32)
        self._fill(self._pooled(), Tables(indptr, indptr, self._empty(1).zero_(), one, one, 1))


def plan_arguments(request: AttentionRequest) -> dict[str, Any]:
    """What ``plan`` is told once and for all. ``None`` and -1 are flashinfer's words for no softcap and no window."""
    left = request.window[0]
    return {
        "window_left": -1 if left is None else left,
        "logits_soft_cap": request.softcap or None,
        "sm_scale": request.softmax_scale,
        "q_data_type": torch_dtype(request.dtype),
        "kv_data_type": torch_dtype(request.kv_dtype),
    }


def _times(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """``x`` ``[tokens, num_q_heads, dim]`` times a scale of one element or one a kv head, rounded once."""
    shape = (x.shape[0], scale.numel(), x.shape[1] // scale.numel(), x.shape[2])
    torch.mul(x.view(shape), scale.view(-1, 1, 1), out=out.view(shape))
    return out
