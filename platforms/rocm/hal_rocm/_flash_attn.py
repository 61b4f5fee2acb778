"""flash-attn on ROCm behind the contract: one factory a kernel of :mod:`hal_rocm.flash_attn_kernels`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest, Step
from hal_rocm._shared import Prefill, nothing, settled, window_of
from hal_rocm.flash_attn_kernels import SWITCH

__all__ = ["ck_decode", "ck_extend", "ck_prefill", "triton_prefill"]


def ck_prefill(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``flash_attn_func`` and ``flash_attn_varlen_func`` over CK."""
    told = {**_told(request), "window_size": window_of(request), "deterministic": request.deterministic}
    return _prefill(request, _interface(triton=False), told)


def triton_prefill(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``flash_attn_func`` and ``flash_attn_varlen_func`` over Triton."""
    return _prefill(request, _interface(triton=True), _told(request))


def ck_extend(request: AttentionRequest, device: hal.Device) -> Paged:
    """``flash_attn_varlen_func`` with a block table."""
    return Extend(request, _interface(triton=False).flash_attn_varlen_func)


def ck_decode(request: AttentionRequest, device: hal.Device) -> Paged:
    """``flash_attn_with_kvcache``."""
    return Decode(request, _interface(triton=False).flash_attn_with_kvcache)


def _interface(*, triton: bool) -> Any:
    """flash-attn's functions, if the back end that was asked for is behind them.

    Raises:
        ImportError: it is not.
    """
    module = importlib.import_module("flash_attn.flash_attn_interface")
    found = bool(getattr(module, "USE_TRITON_ROCM", False))
    if found != triton:
        has, lacks = ("Triton", "CK") if found else ("CK", "Triton")
        raise ImportError(
            f"flash-attn is imported with its {has} back end, not with {lacks}: {SWITCH} is read when it is first "
            "imported, and without the extension flash_attn_2_cuda there is only Triton"
        )
    return module


def _told(request: AttentionRequest) -> dict[str, Any]:
    return {"softmax_scale": request.softmax_scale, "causal": request.causal}


def _prefill(request: AttentionRequest, module: Any, told: dict[str, Any]) -> Prefill:
    def dense(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = module.flash_attn_func(q, k, v, **told, alibi_slopes=slopes, return_attn_probs=with_lse)
        return (found[0], found[1]) if with_lse else (found, None)

    def ragged(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        sinks: Tensor | None,
        slopes: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        found = module.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, **told, alibi_slopes=slopes, return_attn_probs=with_lse
        )
        return (found[0], found[1]) if with_lse else (found, None)

    return Prefill(request, dense, ragged)


class Paged:
    """What both paged phases share: the plan is the block table, with adjacent columns."""

    def __init__(self, request: AttentionRequest, function: Callable[..., Any]) -> None:
        self._request = request
        self._function = function
        self._told = {**_told(request), "window_size": window_of(request)}

    def plan(self, step: Step) -> Tensor:
        """The block table."""
        table = step.block_table
        return table if table.stride(1) == 1 or table.shape[1] < 2 else table.contiguous()

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
        if not q.shape[0] or not step.max_q_len:
            out, lse = nothing(q, self._request, None, return_lse)
        else:
            out, lse = self._attend(q, k_cache, v_cache, step, payload, alibi_slopes, return_lse)
        return (out, lse) if return_lse else out

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, table: Tensor, slopes: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class Extend(Paged):
    """Ragged queries."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, table: Tensor, slopes: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = self._function(
            q,
            k,
            v,
            step.cu_seqlens_q,
            step.cu_seqlens_k,
            step.max_q_len,
            step.max_kv_len,
            **self._told,
            alibi_slopes=slopes,
            block_table=table,
            return_attn_probs=with_lse,
        )
        return (found[0], settled(found[1]).t()) if with_lse else (found, None)


class Decode(Paged):
    """Queries of one length, seen as ``[rows, q_len, heads, dim]``."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, table: Tensor, slopes: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = min(q.shape[0] // step.max_q_len, step.batch)
        used = rows * step.max_q_len
        found = self._function(
            q[:used].view(rows, step.max_q_len, *q.shape[1:]),
            k,
            v,
            cache_seqlens=step.kv_lens[:rows],
            block_table=table[:rows],
            **self._told,
            alibi_slopes=slopes,
            return_softmax_lse=with_lse,
        )
        out, lse = found if with_lse else (found, None)
        out = out.flatten(0, 1)
        lse = None if lse is None else settled(lse).transpose(1, 2).flatten(0, 1)
        if used == q.shape[0]:
            return out, lse
        rest, minus = nothing(q[used:], self._request, None, with_lse)
        return torch.cat([out, rest]), None if lse is None or minus is None else torch.cat([lse, minus])
