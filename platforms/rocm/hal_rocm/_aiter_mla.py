"""aiter's ``mla_decode_fwd`` behind the contract of latent attention; see :mod:`hal_rocm.aiter_mla_kernels`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.attention import Step
from hal_ops.mla_attention import MlaAttentionRequest
from hal_rocm._aiter_paged import Places
from hal_rocm._slots import gap_of, tokens

__all__ = ["decode", "fp8_decode"]

_MOST_BYTES = 1 << 31
"""Of a cache, that 32-bit offsets reach."""


def decode(request: MlaAttentionRequest, device: hal.Device) -> Decode:
    """The decode phase: one query a row."""
    return Decode(request, importlib.import_module("aiter.mla").mla_decode_fwd)


def fp8_decode(request: MlaAttentionRequest, device: hal.Device) -> Fp8Decode:
    """The same over a cache in FP8."""
    return Fp8Decode(request, device, importlib.import_module("aiter.mla").mla_decode_fwd)


@dataclasses.dataclass
class Rows:
    """One step's rows with a query.

    Fields:
        count: how many; any others come behind them, without queries or keys.
        lengths: int32 ``[count + 1]``, cumulative queries. last: int32 ``[count]``, ones: tokens of the last pages.
        places: where the tokens lie. keyless: int64, rows that have a query and no key; None where there are none.
    """

    count: int
    lengths: Tensor
    last: Tensor
    places: Places
    keyless: Tensor | None


class Decode:
    """``mla_decode_fwd`` over pages of one token."""

    def __init__(self, request: MlaAttentionRequest, function: Callable[..., Any]) -> None:
        self._rank = request.kv_lora_rank
        self._scale = request.softmax_scale
        self._function = function

    def plan(self, step: Step) -> Rows:
        """The places of the step's tokens. Waits for nothing."""
        count = sum(step.q_lens)
        device = step.kv_lens.device
        without = [row for row in range(count) if not step.kv_lens_host[row]]
        return Rows(
            count=count,
            lengths=step.cu_seqlens_q[: count + 1],
            last=torch.ones(count, dtype=torch.int32, device=device),
            places=Places.of(step, sum(step.kv_lens_host)),
            keyless=torch.tensor(without).to(device, non_blocking=True) if without else None,
        )

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Rows,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        """``return_lse`` is not declared, so nobody asks for it."""
        count = payload.count
        out = q.new_empty((*q.shape[:2], self._rank))
        out[count:] = 0.0
        if count and sum(step.kv_lens_host):
            entries = cache.unsqueeze(2)
            gap = gap_of(entries, entries)
            pages = tokens(entries, gap).unsqueeze(1)
            _check_reach(pages)
            given, scales = self._inputs(q[:count].contiguous(), kv_scale)  # declared in Kernel.copies
            self._function(
                given,
                pages,
                out[:count],
                payload.lengths,
                payload.places.indptr[: count + 1],
                payload.places.at(gap),
                payload.last,
                1,
                sm_scale=self._scale,
                **scales,
            )
        if payload.keyless is not None:
            out[payload.keyless] = 0.0
        return out

    def _inputs(self, q: Tensor, kv_scale: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The queries, and what is said only of FP8 caches."""
        return q, {}


class Fp8Decode(Decode):
    """Queries in the cache's format, each row in one piece."""

    def __init__(self, request: MlaAttentionRequest, device: hal.Device, function: Callable[..., Any]) -> None:
        super().__init__(request, function)
        made = hal.get_op(
            "fp8_quantize", hidden_size=request.entry_dim, dtype=request.dtype, fp8_dtype=request.kv_dtype,
            granularity="tensor", device=device,
        )  # fmt: skip
        self._quantize: Callable[[Tensor], tuple[Tensor, Tensor]] = made.fn
        self._one = torch.ones(1, device=device.torch_device())

    def _inputs(self, q: Tensor, kv_scale: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        values, q_scale = self._quantize(q)
        kv_scale = self._one if kv_scale is None else kv_scale
        return values, {"q_scale": q_scale.view(1), "kv_scale": kv_scale, "num_kv_splits": 1}


def _check_reach(pages: Tensor) -> None:
    if pages.shape[0] * pages.stride(0) * pages.element_size() > _MOST_BYTES:
        raise ValueError(
            f"the cache spans {pages.shape[0]} tokens, above 2 GiB, which aiter's assembly is not known to reach: force "
            "another kernel (kernel='triton'), or split the cache"
        )
