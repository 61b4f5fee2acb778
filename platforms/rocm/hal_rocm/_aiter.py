"""aiter's CK and assembly attention behind the contract: one factory a kernel of :mod:`hal_rocm.aiter_kernels`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_ops.attention import AttentionRequest, masks
from hal_rocm._aiter_paged import Decode, Extend
from hal_rocm._shared import Prefill, mask_of, unseeing

__all__ = ["decode", "extend", "prefill"]

Found = tuple[Tensor, "Tensor | None"]
Lengths = tuple[Tensor, Tensor, int, int]


def prefill(request: AttentionRequest, device: hal.Device) -> Prefill:
    """``flash_attn_func`` for dense calls, ``flash_attn_varlen_func`` for ragged ones, and for all with a soft cap."""
    library = importlib.import_module("aiter.ops.mha")
    mask, right = mask_of(request), masks.sides(request.causal, request.window)[1]
    told = {**mask, "softmax_scale": request.softmax_scale, "window_size": (*mask["window_size"], 0)}
    cap = {"logits_soft_cap": request.softcap} if request.softcap else {}

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, sinks: Tensor | None, slopes: Tensor | None, with_lse: bool
    ) -> Found:
        more = _more(sinks, slopes, with_lse)
        return _pair(library.flash_attn_varlen_func(q, k, v, *lengths, **told, **cap, **more), with_lse)

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
    ) -> Found:
        out, lse = varlen(q, k, v, (cu_q, cu_k, max_q, max_k), sinks, slopes, with_lse)
        if cu_q is cu_k or sinks is not None:
            return out, lse
        # Nothing says what the assembly kernels write for queries that see no key; with sinks it is never they.
        unseen = unseeing(cu_q, cu_k, q.shape[0], right)
        return out.masked_fill_(unseen[:, None, None], 0.0), None if lse is None else lse.masked_fill(unseen, -math.inf)

    def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, slopes: Tensor | None, with_lse: bool) -> Found:
        if cap:  # flash_attn_func has no argument for it
            return _as_ragged(varlen, q, k, v, sinks, slopes, with_lse)
        return _pair(library.flash_attn_func(q, k, v, **told, **_more(sinks, slopes, with_lse)), with_lse)

    return Prefill(request, dense, ragged)


def extend(request: AttentionRequest, device: hal.Device) -> Extend:
    """``mha_batch_prefill_func``."""
    return Extend(request, importlib.import_module("aiter.ops.mha").mha_batch_prefill_func)


def decode(request: AttentionRequest, device: hal.Device) -> Decode:
    """``paged_attention_ragged``."""
    attention = importlib.import_module("aiter.ops.attention")
    return Decode(request, device.torch_device(), attention.paged_attention_ragged)


def _more(sinks: Tensor | None, slopes: Tensor | None, with_lse: bool) -> dict[str, Any]:
    """What a call brings. Versions before v0.1.10 have no argument for sinks."""
    return {"alibi_slopes": slopes, "return_lse": with_lse, **({} if sinks is None else {"sink_ptr": sinks})}


def _pair(result: Any, with_lse: bool) -> Found:
    """aiter returns a tensor alone, or a tuple of what was asked for."""
    return (result[0], result[1]) if with_lse else (result, None)


def _as_ragged(
    varlen: Callable[..., Found],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    with_lse: bool,
) -> Found:
    """A dense batch as sequences of one length; the LSE as ``[batch, heads, len]`` again."""
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
    cu_q, cu_k = (torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device) for n in (q_len, kv_len))
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = varlen(*flat, (cu_q, cu_k, q_len, kv_len), sinks, slopes, with_lse)
    lse = None if lse is None else lse.reshape(-1, batch, q_len).transpose(0, 1)
    return out.reshape(batch, q_len, *out.shape[1:]), lse
