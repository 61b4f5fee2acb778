"""flash-attention 3: fresh keys through ``flash_attn_func`` and ``flash_attn_varlen_func``, caches through
``flash_attn_with_kvcache``, which alone takes pages.

The plan is what the library's own planner makes: how rows are split and ordered, once a step instead of once a layer.
Its size is asserted here, since the library finds a wrong one only at the launch, and a captured graph never does.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

import torch
from flash_attn_interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from torch import Tensor

import hal
from hal_nvidia._flash import nothing, window_of, without_tail
from hal_nvidia._flash_attn_3_sizes import check_size, metadata_sizes
from hal_nvidia._fp8_query import quantizer
from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest, PagedAttention, PrefillAttention, Step, with_lengths
from hal_ops.attention.reference import check_tensors

__all__ = ["decode", "extend", "prefill"]


def _check_sinks(request: AttentionRequest) -> None:
    if request.sinks and "sinks" not in inspect.signature(flash_attn_with_kvcache).parameters:
        raise ValueError("flash_attn_with_kvcache of the installed flash-attention 3 takes no sinks")


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase.

    Raises:
        ValueError: sinks are asked for, and the library's functions take none.
    """
    _check_sinks(request)
    return _Prefill(request)


class _Prefill:
    def __init__(self, request: AttentionRequest) -> None:
        options: dict[str, Any] = {
            "softmax_scale": request.softmax_scale,
            "causal": request.causal,
            "window_size": window_of(request),
            "softcap": request.softcap,
            "deterministic": request.deterministic and request.needs_grad,
        }
        self._request = request
        self._dense, self._ragged = partial(flash_attn_func, **options), partial(flash_attn_varlen_func, **options)
        self._dtype = torch_dtype(request.dtype)
        self._bare = not (request.sinks or request.return_lse or request.graph or is_fp8(request.qkv_dtype))
        """Whether a call has nothing but q, k and v."""

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The library's function itself, where a call has keys and queries."""
        return self._dense if q.numel() and k.numel() else self

    def for_step(self, step: Step) -> Any:
        """The library's function with the step's lengths, where a call can have nothing more."""
        return with_lengths(self._ragged if self._bare and step.num_tokens else self, step)

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
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        request = self._request
        if request.sinks or sinks is not None or alibi_slopes is not None:
            check_tensors(request, sinks, alibi_slopes)
        if not q.numel() or not k.numel():
            return nothing(q, request.v_head_dim, return_lse, self._dtype, sinks)
        more: dict[str, Any] = {} if sinks is None else {"sinks": sinks.to(torch.bfloat16)}
        if not q_scale is k_scale is v_scale is None:
            rows = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
            more.update(_descales((rows, request.num_kv_heads), q_scale, k_scale, v_scale))
        if cu_seqlens_q is None:
            found = self._dense(q, k, v, return_attn_probs=return_lse, **more)
        else:
            if request.graph and cu_seqlens_k is not None:
                v = without_tail(v, cu_seqlens_k)
            found = self._ragged(
                q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q or q.shape[0], max_seqlen_k=max_seqlen_k or k.shape[0],
                return_attn_probs=return_lse, **more,
            )  # fmt: skip
        return (found[0], found[1].transpose(-1, -2)) if return_lse else found


def _descales(size: tuple[int, int], *scales: Tensor | None) -> dict[str, Tensor]:
    """One number a row and kv head, without a copy."""
    names = ("q_descale", "k_descale", "v_descale")
    return {name: scale.expand(size) for name, scale in zip(names, scales, strict=True) if scale is not None}


def extend(request: AttentionRequest, device: hal.Device) -> PagedAttention:
    """The extend phase.

    Raises:
        ValueError: sinks are asked for, and the library's functions take none.
    """
    return _Paged(request, device)


def decode(request: AttentionRequest, device: hal.Device) -> PagedAttention:
    """The decode phase: the same as :func:`extend`.

    Raises:
        ValueError: sinks are asked for, and the library's functions take none.
    """
    return _Paged(request, device)


@dataclasses.dataclass(slots=True)
class Schedule:
    """One step's plan: the planner's metadata, and the library's function with all that layers have in common."""

    metadata: Tensor
    attend: Any


class _Paged:
    def __init__(self, request: AttentionRequest, device: hal.Device) -> None:
        _check_sinks(request)
        self._request = request
        self._hopper = device.arch.name == "sm_90"
        self._heads_first = request.kv_layout == "HND"
        self._kv_heads = request.num_kv_heads
        # Only without splits do the sums of a row not depend on the rows beside it.
        splits = 1 if request.deterministic else 0
        masks: dict[str, Any] = {"causal": request.causal, "window_size": window_of(request), "num_splits": splits}
        self._with_sinks = request.sinks
        self._attend = partial(
            flash_attn_with_kvcache, softmax_scale=request.softmax_scale, softcap=request.softcap, **masks
        )
        self._planning = {
            "qkv_dtype": torch_dtype(request.kv_dtype),
            "headdim_v": request.v_head_dim,
            "has_softcap": request.softcap > 0,
            **masks,
        }
        self._quantize = quantizer(request, device) if is_fp8(request.kv_dtype) else None
        self._bare = not (request.sinks or self._heads_first or self._quantize)
        """Whether a call without an LSE has nothing to be converted."""

    def plan(self, step: Step) -> Schedule | None:
        """The planner's metadata. One kernel is launched; nothing waits for it."""
        longest = step.max_q_len
        if not step.batch or not longest or not step.block_table.shape[1]:
            return None
        metadata = self._metadata(step, longest)
        attend = partial(
            self._attend, cache_seqlens=step.kv_lens, page_table=step.block_table, cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=longest, scheduler_metadata=metadata,
        )  # fmt: skip
        return Schedule(metadata, attend)

    def update(self, step: Step, payload: Schedule | None) -> Schedule | None:
        """The metadata of another step, in the memory of ``payload`` where a captured graph may hold its address.

        Raises:
            ValueError: the step's metadata has another size.
        """
        made = self.plan(step)
        if not self._request.graph or payload is None or made is None:
            return made
        check_size(made.metadata.numel(), (payload.metadata.numel(),), f"a plan of {payload.metadata.numel()}")
        payload.metadata.copy_(made.metadata)
        return payload

    def _metadata(self, step: Step, longest: int) -> Tensor:
        request, width = self._request, step.block_table.shape[1] * step.page_size
        made: Tensor = get_scheduler_metadata(
            step.batch, longest, width, request.num_q_heads, request.num_kv_heads, request.head_dim, step.kv_lens,
            cu_seqlens_q=step.cu_seqlens_q, page_size=step.page_size, **self._planning,
        )  # fmt: skip
        wanted = metadata_sizes(request, step.batch, longest, width, hopper=self._hopper)
        check_size(made.numel(), wanted, f"{step.batch} rows of at most {longest} queries and {width} keys")
        return made

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Schedule | None,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if self._bare and payload is not None and sinks is alibi_slopes is None and not return_lse:
            return payload.attend(q, k_cache, v_cache)
        if self._with_sinks or sinks is not None or alibi_slopes is not None:
            check_tensors(self._request, sinks, alibi_slopes)
        if payload is None:
            return nothing(q, self._request.v_head_dim, return_lse)
        more: dict[str, Any] = {} if sinks is None else {"sinks": sinks.to(torch.bfloat16)}
        if self._heads_first:
            k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if self._quantize is not None:
            q, scale = self._quantize(q, step)
            more.update(_descales((step.batch, self._kv_heads), scale, k_scale, v_scale))
        found = payload.attend(q, k_cache, v_cache, return_softmax_lse=return_lse, **more)
        return (found[0], found[1].transpose(0, 1)) if return_lse else found
