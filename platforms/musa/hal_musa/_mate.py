"""MATE behind the attention contract. Its module is found by its own name, never by flash-attn 3's."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

import hal
from hal_musa._mate_tables import spacing, spread, token_table, tokens
from hal_ops import torch_dtype
from hal_ops.attention import AttentionRequest, Step
from hal_ops.attention.reference import check_tensors

__all__ = ["decode", "extend", "prefill"]


def prefill(request: AttentionRequest, device: hal.Device) -> _Prefill:
    """``flash_attn_varlen_func``, which takes dense calls as well."""
    return _Prefill(request)


def extend(request: AttentionRequest, device: hal.Device) -> _Paged:
    """``flash_attn_with_kvcache`` with ragged queries. K and V are in the cache already: nothing is appended."""
    return _Paged(request, device, None)


def decode(request: AttentionRequest, device: hal.Device) -> _Paged:
    """The same; kernels are chosen for the most queries that a row may have."""
    return _Paged(request, device, request.max_q_len)


def _library() -> Any:
    return importlib.import_module("mate.mha_interface")


def _mask(request: AttentionRequest) -> dict[str, Any]:
    """Causality and window in MATE's words: -1 is unlimited.

    Causality is never a window whose right side is 0: ``backend="auto"`` would take a mubin kernel for that, which then
    asserts that the side is below 0.
    """
    left, right = request.window
    causal = request.causal or right == 0
    return {"causal": causal, "window_size": (-1 if left is None else left, -1 if causal or right is None else right)}


class _Prefill:
    """The prefill phase."""

    def __init__(self, request: AttentionRequest) -> None:
        self._attend = _library().flash_attn_varlen_func
        self._request = request
        self._settings = {**_mask(request), "softmax_scale": request.softmax_scale, "softcap": request.softcap}

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
        check_tensors(self._request, sinks, alibi_slopes)
        if not (q.numel() and k.numel()):
            return _no_keys(q, self._request, sinks, return_lse)
        with_lse = return_lse or sinks is not None
        same = cu_seqlens_q is cu_seqlens_k if cu_seqlens_q is not None else q.shape[1] <= k.shape[1]
        found = self._attend(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            return_softmax_lse=with_lse,
            # What mubin kernels leave in rows without keys is written nowhere: they get calls that have none.
            backend="auto" if same else "mutlass",
            **self._settings,
        )
        return _finish(found[0], found[1], sinks, return_lse) if with_lse else found


@dataclasses.dataclass
class _Work:
    """A step in MATE's form.

    Fields:
        table: int32 ``[batch, width]``, the slot of each token. metadata: int32 ``[4 * batch]``, from MATE's planner.
        spread: the table for caches whose pages do not lie behind each other, by their spacing in tokens.
    """

    table: Tensor
    metadata: Tensor
    spread: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def table_for(self, gap: int, page_size: int) -> Tensor:
        if gap == page_size:
            return self.table
        if gap not in self.spread:
            self.spread[gap] = spread(self.table, page_size, gap)
        return self.spread[gap]


class _Paged:
    """The extend and decode phases. A cache is seen as pages of one token: see :mod:`hal_musa._mate_tables`."""

    def __init__(self, request: AttentionRequest, device: hal.Device, most_queries: int | None) -> None:
        library = _library()
        self._attend, self._schedule = library.flash_attn_with_kvcache, library.get_scheduler_metadata
        self._request = request
        self._place = device.torch_device()
        self._most_queries = most_queries
        self._mask = _mask(request)

    def plan(self, step: Step) -> _Work | None:
        """The table of tokens and MATE's own metadata, on this handle's device. Waits for nothing."""
        if not step.batch:
            return None
        request, table = self._request, token_table(step)
        with self._current():
            metadata = self._schedule(
                batch_size=step.batch,
                max_seqlen_q=self._bound(step),
                max_seqlen_k=table.shape[1],
                num_heads_q=request.num_q_heads,
                num_heads_kv=request.num_kv_heads,
                headdim=request.head_dim,
                seqused_k=step.kv_lens,
                qkv_dtype=torch_dtype(request.dtype),
                headdim_v=request.v_head_dim,
                cu_seqlens_q=step.cu_seqlens_q,
                page_size=1,
                has_softcap=request.softcap != 0,
                **self._mask,
            )
        return _Work(table, metadata)

    def update(self, step: Step, payload: _Work | None) -> _Work | None:
        """Plan in place: a captured graph reads the table and the metadata where they are."""
        made = self.plan(step)
        if made is None or payload is None or made.table.shape != payload.table.shape:
            return made
        payload.table.copy_(made.table)
        payload.metadata.copy_(made.metadata)
        for gap, table in payload.spread.items():
            table.copy_(spread(made.table, step.page_size, gap))
        return payload

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: _Work | None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        check_tensors(self._request, sinks, alibi_slopes)
        if k_scale is not None or v_scale is not None:
            raise ValueError("scales are for FP8 caches, and MATE reads none: give no k_scale and no v_scale")
        if payload is None or not q.shape[0]:
            return _no_keys(q, self._request, sinks, return_lse)
        with_lse = return_lse or sinks is not None
        gap = spacing(k_cache, v_cache)
        found = self._attend(
            q,
            tokens(k_cache, gap),
            tokens(v_cache, gap),
            cache_seqlens=step.kv_lens,
            page_table=payload.table_for(gap, step.page_size),
            cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=self._bound(step),
            softmax_scale=self._request.softmax_scale,
            softcap=self._request.softcap,
            scheduler_metadata=payload.metadata,
            return_softmax_lse=with_lse,
            **self._mask,
        )
        return _finish(found[0], found[1], sinks, return_lse) if with_lse else found

    def _bound(self, step: Step) -> int:
        """The most queries a row; the same for the planner and the call."""
        return step.max_q_len if self._most_queries is None else self._most_queries

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """This handle's device as the current one: MATE's planner allocates on ``"musa"``, whichever that is."""
        found: contextlib.AbstractContextManager[Any] = torch.get_device_module(self._place).device(self._place)
        return found


def _finish(out: Tensor, lse: Tensor, sinks: Tensor | None, return_lse: bool) -> Any:
    """LSE as ``[..., tokens, heads]``, and the sinks in the denominator."""
    lse = lse.transpose(-1, -2)
    if sinks is not None:
        share = torch.sigmoid(lse - sinks.clamp_min(torch.finfo(torch.float32).min))
        out = (out * share.unsqueeze(-1)).to(out.dtype)
        lse = torch.logaddexp(lse, sinks)
    return (out, lse) if return_lse else out


def _no_keys(q: Tensor, request: AttentionRequest, sinks: Tensor | None, return_lse: bool) -> Any:
    """What rows without keys give. MATE launches nothing over no queries or no keys at all."""
    out = q.new_zeros((*q.shape[:-1], request.v_head_dim))
    if not return_lse:
        return out
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    return out, lse if sinks is None else torch.logaddexp(lse, sinks)
