"""aiter's ``unified_attention`` behind the contract."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops import is_fp8
from hal_ops.attention import AttentionRequest, Step
from hal_rocm._shared import window_of

__all__ = ["decode", "extend"]


def extend(request: AttentionRequest, device: hal.Device) -> Unified:
    """Rows of any number of queries."""
    return Unified(request, device.torch_device(), _function(), single=False)


def decode(request: AttentionRequest, device: hal.Device) -> Unified:
    """One query a row, or a few."""
    return Unified(request, device.torch_device(), _function(), single=request.max_q_len == 1)


def _function() -> Callable[..., Any]:
    module: Any = importlib.import_module("aiter.ops.triton.attention.unified_attention")
    function: Callable[..., Any] = module.unified_attention
    return function


class Unified:
    """Both phases. With ``single`` each row has one query, and row i is token i, which the function relies on."""

    def __init__(
        self, request: AttentionRequest, device: torch.device, function: Callable[..., Any], *, single: bool
    ) -> None:
        self._function = function
        self._single = single
        self._token_dim = 1 if request.kv_layout == "NHD" else 2
        self._one = torch.ones(1, dtype=torch.float32, device=device) if is_fp8(request.kv_dtype) else None
        self._told = {
            "softmax_scale": request.softmax_scale,
            "causal": True,
            "window_size": window_of(request),
            "softcap": request.softcap,
            "q_descale": None,
        }

    def plan(self, step: Step) -> Tensor:
        """The block table, with adjacent columns: its rows are found by stride."""
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
    ) -> Tensor:
        out = q.new_empty(q.shape)
        if not q.shape[0]:
            return out
        rows = min(q.shape[0], step.batch) if self._single else step.batch
        tokens = rows if self._single else q.shape[0]
        self._function(
            q[:tokens],
            k_cache.transpose(1, self._token_dim),
            v_cache.transpose(1, self._token_dim),
            out[:tokens],
            cu_seqlens_q=step.cu_seqlens_q[: rows + 1],
            max_seqlen_q=1 if self._single else max(2, step.max_q_len),
            seqused_k=step.kv_lens[:rows],
            max_seqlen_k=step.max_kv_len,
            block_table=payload[:rows],
            k_descale=self._one if k_scale is None else k_scale,
            v_descale=self._one if v_scale is None else v_scale,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            **self._told,
        )
        return out
