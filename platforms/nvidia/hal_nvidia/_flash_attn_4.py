"""flash-attn 4 behind the attention contract. Keywords alone: the order of its parameters has changed between betas."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia._flash import nothing, without_tail
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, Step, with_lengths

__all__ = ["decode", "extend", "prefill"]

_SPLITS_ON = ("sm_100", "sm_103")
"""Archs whose kernels can split the keys of a row over several blocks."""


def prefill(request: AttentionRequest, device: hal.Device) -> _Prefill:
    """``flash_attn_func`` for dense calls, ``flash_attn_varlen_func`` for ragged ones."""
    return _Prefill(request)


def extend(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``flash_attn_varlen_func`` with a page table."""
    return _Paged(request, splits=1)


def decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """The same, with as many splits as the library finds good (0) where it has them and bits may vary."""
    free = device.arch.name in _SPLITS_ON and not request.deterministic
    return _Paged(request, splits=0 if free else 1)


def _cute() -> Any:
    return importlib.import_module("flash_attn.cute")


def _settings(request: AttentionRequest) -> dict[str, Any]:
    """Arguments that stay the same. An unlimited side of the window is None: -1 would be a limit."""
    return {
        "softmax_scale": request.softmax_scale,
        "causal": request.causal,
        "window_size": request.window,
        "softcap": request.softcap,
    }


class _Prefill:
    """The prefill phase."""

    def __init__(self, request: AttentionRequest) -> None:
        cute, settings = _cute(), {**_settings(request), "deterministic": request.deterministic}
        self._dense = partial(cute.flash_attn_func, **settings)
        self._ragged = partial(cute.flash_attn_varlen_func, **settings)
        self._v_head_dim = request.v_head_dim
        self._graph = request.graph
        self._bare = not (request.sinks or request.return_lse or request.graph)
        """Whether a call has nothing but q, k and v."""

    def for_step(self, step: Step) -> Any:
        """The library's function with the step's lengths, where a call can have nothing more."""
        if not self._bare or not step.num_tokens:
            return with_lengths(self, step)
        ragged = with_lengths(self._ragged, step)
        return lambda q, k, v: ragged(q, k, v)[0]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if not q.numel() or not k.numel():
            return nothing(q, self._v_head_dim, return_lse, sinks=sinks)
        if cu_seqlens_q is None:
            refuse_wide(q.shape[0], "fa4")
            out, lse = self._dense(q, k, v, learnable_sink=sinks, return_lse=return_lse)
            return (out, _finite(lse.transpose(1, 2), sinks)) if return_lse else out
        if self._graph and cu_seqlens_k is not None:
            v = without_tail(v, cu_seqlens_k)
        out, lse = self._ragged(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            learnable_sink=sinks,
            return_lse=return_lse,
        )
        return (out, _finite(lse.t(), sinks)) if return_lse else out


def _finite(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """The LSE ``[..., heads]``, with the sink itself where it is +inf: the sink is then above every score by more than 88,
    and the library, whose sums are relative to the largest score, has lost it to an overflow (seen with 4.0.0b36)."""
    return lse if sinks is None else lse.where(lse != torch.inf, sinks)


class _Paged:
    """Both paged phases. The bound on the keys is the page table's: it holds for every replay of a graph."""

    def __init__(self, request: AttentionRequest, *, splits: int) -> None:
        self._attend = partial(_cute().flash_attn_varlen_func, **_settings(request), num_splits=splits)
        self._v_head_dim = request.v_head_dim

    def plan(self, step: Step) -> Any:
        """The library's function with the step's tensors and bounds. Lengths and tables are read on the device."""
        return partial(
            self._attend,
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_q_len,
            max_seqlen_k=step.block_table.shape[1] * step.page_size,
            seqused_k=step.kv_lens,
            page_table=step.block_table,
        )

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Any,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if not q.shape[0] or not step.max_q_len:
            return nothing(q, self._v_head_dim, return_lse, sinks=sinks)
        if sinks is None and not return_lse:
            return payload(q, k_cache, v_cache)[0]
        out, lse = payload(q, k_cache, v_cache, learnable_sink=sinks, return_lse=return_lse)
        return (out, _finite(lse.t(), sinks)) if return_lse else out
