"""flash-attn 4 behind the attention contract. Keywords alone: the order of its parameters has changed between betas."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest, Step

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
        cute = _cute()
        self._dense, self._ragged = cute.flash_attn_func, cute.flash_attn_varlen_func
        self._settings = {**_settings(request), "deterministic": request.deterministic}

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
        if cu_seqlens_q is None:
            out, lse = self._dense(q, k, v, learnable_sink=sinks, return_lse=return_lse, **self._settings)
            return (out, lse.transpose(1, 2)) if return_lse else out
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
            **self._settings,
        )
        return (out, lse.t()) if return_lse else out


class _Paged:
    """Both paged phases. The bound on the keys is the page table's: it holds for every replay of a graph."""

    def __init__(self, request: AttentionRequest, *, splits: int) -> None:
        self._function = _cute().flash_attn_varlen_func
        self._settings = {**_settings(request), "num_splits": splits}

    def plan(self, step: Step) -> None:
        """Nothing: lengths and tables are read on the device."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        out, lse = self._function(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_q_len,
            max_seqlen_k=step.block_table.shape[1] * step.page_size,
            seqused_k=step.kv_lens,
            page_table=step.block_table,
            learnable_sink=sinks,
            return_lse=return_lse,
            **self._settings,
        )
        return (out, lse.t()) if return_lse else out
