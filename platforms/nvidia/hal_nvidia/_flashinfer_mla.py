"""flashinfer's ``BatchMLAPagedAttentionWrapper`` behind the contract of latent attention: decode alone.

Its plan lists the tiles of a step in room for 16384 of them and does not look whether they fit
(``include/flashinfer/attention/scheduler.cuh``, ``MLAPlan``, ``max_total_num_works``): the adapter does.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._flash import nothing
from hal_nvidia._flashinfer_pool import Lease
from hal_nvidia._flashinfer_tables import page_tables
from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import Step
from hal_ops.mla_attention import MlaAttention, MlaAttentionRequest

__all__ = ["fa2_decode", "fa3_decode"]

_LN_2 = math.log(2.0)
_MIB = 1 << 20
_TILE = 64
_MOST_TILES = 16384
_MOST_PROCESSORS = 256


def fa2_decode(request: MlaAttentionRequest, device: hal.Device) -> MlaAttention:
    """The decode phase with backend fa2."""
    return _Mla(request, device, "fa2")


def fa3_decode(request: MlaAttentionRequest, device: hal.Device) -> MlaAttention:
    """The decode phase with backend fa3."""
    return _Mla(request, device, "fa3")


class _Mla:
    def __init__(self, request: MlaAttentionRequest, device: hal.Device, backend: str) -> None:
        self._place = device.torch_device()
        self._rank, self._heads = request.kv_lora_rank, request.num_q_heads
        self._parts = (request.kv_lora_rank, request.qk_rope_head_dim)
        self._processors = device.multiprocessors or _MOST_PROCESSORS
        self._make = functools.partial(
            importlib.import_module("flashinfer").BatchMLAPagedAttentionWrapper, backend=backend
        )
        # Its own scales of an FP8 cache are numbers of the host, which would be waited for, and it rounds them to bf16.
        fp8 = is_fp8(request.kv_dtype)
        self._unscaled: dict[str, float] = {"ckv_scale": 1.0, "kpe_scale": 1.0} if fp8 else {}
        self._arguments = {
            "num_heads": request.num_q_heads,
            "head_dim_ckv": request.kv_lora_rank,
            "head_dim_kpe": request.qk_rope_head_dim,
            "page_size": int(request.page_size),
            "causal": request.causal,
            "sm_scale": request.softmax_scale,
            "q_data_type": torch_dtype(request.dtype),
            "kv_data_type": torch_dtype(request.kv_dtype),
        }

    def plan(self, step: Step) -> Lease:
        """A wrapper of its own for the step. Waits for nothing.

        Raises:
            ValueError: the step has more tiles than a plan of flashinfer holds.
        """
        stream = pool.stream_of(self._place)
        # Partial results: two a multiprocessor, 64 rows each, at most in float32, and their logsumexps.
        size = 2 * self._processors * _TILE * (self._rank + 1) * 4 + _MIB
        buffer = pool.scratch(self._place, stream, size)
        make = functools.partial(self._make, buffer)
        taken = pool.lease((*pool.identity(self._make), buffer.data_ptr(), str(self._place), stream), make)
        return self.update(step, taken)

    def update(self, step: Step, payload: Lease) -> Lease:
        """Plan the same wrapper anew."""
        tiles = sum(-(-q_len * self._heads // _TILE) for q_len in step.q_lens) + 2 * self._processors
        if tiles > _MOST_TILES:
            raise ValueError(
                f"the step has up to {tiles} tiles of {_TILE} queries and heads, and flashinfer's plan holds "
                f"{_MOST_TILES}: decode fewer rows at a time, or force another library"
            )
        payload.tokens = sum(step.q_lens)
        if payload.tokens:
            tables = page_tables(step, tail=False)
            payload.plan(
                lambda wrapper: wrapper.plan(
                    tables.qo_indptr, tables.kv_indptr, tables.indices, tables.seq_lens, **self._arguments
                )
            )
        return payload

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Lease,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        rank, tokens = self._rank, payload.tokens
        if not tokens or q.shape[0] != tokens:
            return self._padded(q, cache, step, payload, kv_scale, return_lse)
        if not q.is_contiguous():
            payload.check_reach(q)
        if kv_scale is not None:
            q = torch.mul(q, kv_scale, out=torch.empty_like(q))
        # It makes the output as the queries are, but for the gaps in them.
        out = None if q.is_contiguous() else q.new_empty((*q.shape[:2], rank))
        found = payload.run(
            *q.split_with_sizes(self._parts, -1), *cache.split_with_sizes(self._parts, -1),
            out=out, return_lse=return_lse, **self._unscaled,
        )  # fmt: skip
        out = found[0] if return_lse else found
        if kv_scale is not None:
            torch.mul(out, kv_scale, out=out)
        return (out, found[1].mul_(_LN_2)) if return_lse else out

    def _padded(
        self, q: Tensor, cache: Tensor, step: Step, payload: Lease, kv_scale: Tensor | None, return_lse: bool
    ) -> Any:
        """A call with tokens beside those of the plan, which come last and see no key."""
        if q.shape[0] < payload.tokens:
            raise ValueError(f"q has {q.shape[0]} tokens, and the plan is for {payload.tokens}")
        whole = nothing(q, self._rank, return_lse)
        if payload.tokens:
            found = self(q[: payload.tokens], cache, step, payload, kv_scale=kv_scale, return_lse=return_lse)
            for mine, given in zip(whole, found, strict=True) if return_lse else ((whole, found),):
                mine[: payload.tokens] = given
        return whole
