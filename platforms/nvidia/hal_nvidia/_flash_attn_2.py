"""flash-attention 2: ``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache``.

``flash_attn_2_cuda`` is imported first: the package ``flash_attn`` may also be there with flash-attention 4 alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flash_attn_2_cuda  # noqa: F401
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia._flash import as_ragged, has_far_gradients, longest_query, nothing, window_of, with_step, without_keys
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, PagedAttention, PrefillAttention, Step
from hal_ops.attention.reference import check_tensors

__all__ = ["decode", "extend", "prefill"]


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    return _Prefill(request)


class _Prefill:
    def __init__(self, request: AttentionRequest) -> None:
        options = {**_masks(request), "deterministic": request.deterministic}
        self._request = request
        self._dense, self._ragged = partial(flash_attn_func, **options), partial(flash_attn_varlen_func, **options)

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The library's function itself, where a call has keys and queries, and nothing else."""
        if not q.numel() or not k.numel() or has_far_gradients(q, self._request):
            return self
        refuse_wide(q.shape[0], "fa2")
        return self._dense

    def for_step(self, step: Step) -> Any:
        """This with the lengths of a step."""
        return with_step(self, step)

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
        request = self._request
        if request.alibi or sinks is not None or alibi_slopes is not None:
            check_tensors(request, sinks, alibi_slopes)
        if not q.numel() or not k.numel():
            return nothing(q, request.v_head_dim, return_lse)
        if cu_seqlens_q is None and has_far_gradients(q, request):
            return as_ragged(self, q, k, v, alibi_slopes)
        refuse_wide(q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, "fa2")
        if cu_seqlens_q is None:
            found = self._dense(q, k, v, alibi_slopes=alibi_slopes, return_attn_probs=return_lse)
        else:
            found = self._ragged(
                q, k, v, cu_seqlens_q, cu_seqlens_k, longest_query(q, cu_seqlens_q, max_seqlen_q),
                max_seqlen_k or k.shape[0], alibi_slopes=alibi_slopes, return_attn_probs=return_lse,
            )  # fmt: skip
        return (found[0], without_keys(found[1].transpose(-1, -2))) if return_lse else found


def _masks(request: AttentionRequest) -> dict[str, Any]:
    """The arguments that each of the functions takes."""
    return {
        "softmax_scale": request.softmax_scale,
        "causal": request.causal,
        "window_size": window_of(request),
        "softcap": request.softcap,
    }


def extend(request: AttentionRequest, device: hal.Device) -> PagedAttention:
    """The extend phase."""
    return _Extend(request)


def decode(request: AttentionRequest, device: hal.Device) -> PagedAttention:
    """The decode phase."""
    return _Decode(request)


class _Paged:
    def __init__(self, request: AttentionRequest) -> None:
        self._request = request
        self._heads_first = request.kv_layout == "HND"
        self._plain = not request.alibi
        self._varlen = partial(flash_attn_varlen_func, **_masks(request))
        self._with_kvcache = partial(flash_attn_with_kvcache, **_masks(request))

    def _check(self, sinks: Tensor | None, alibi_slopes: Tensor | None) -> None:
        if not self._plain or sinks is not None or alibi_slopes is not None:
            check_tensors(self._request, sinks, alibi_slopes)

    def plan(self, step: Step) -> None:
        refuse_wide(step.batch, "fa2")

    def _caches(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        return (k_cache.transpose(1, 2), v_cache.transpose(1, 2)) if self._heads_first else (k_cache, v_cache)


class _Extend(_Paged):
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
        self._check(sinks, alibi_slopes)
        if not q.numel() or not step.max_kv_len:
            return nothing(q, self._request.v_head_dim, return_lse)
        # One query in every row may be said, see longest_query, only where there is.
        singles = q.shape[0] == step.num_tokens == step.batch and not self._request.graph
        found = self._varlen(
            q, *self._caches(k_cache, v_cache), step.cu_seqlens_q, step.cu_seqlens_k,
            step.max_q_len if singles else max(2, step.max_q_len), step.max_kv_len, block_table=step.block_table,
            alibi_slopes=alibi_slopes, return_attn_probs=return_lse,
        )  # fmt: skip
        return (found[0], without_keys(found[1].transpose(0, 1))) if return_lse else found


class _Decode(_Paged):
    """What is planned is the number of queries a row, which is a size of the call."""

    def plan(self, step: Step) -> int:  # type: ignore[override]
        refuse_wide(step.batch, "fa2")
        return step.q_lens[0] if step.q_lens else 0

    def update(self, step: Step, payload: int) -> int:
        return payload if self._request.graph else self.plan(step)

    def refuses(self, step: Step, payload: int) -> str:
        """Why a captured launch, which has one number of queries a row, does not serve this step."""
        q_len = self.plan(step)
        if not self._request.graph or q_len in (0, payload):
            return ""
        return (
            f"the step has q_len {q_len}, and the plan was made for {payload}: flash-attention 2 decodes rows of one length "
            "in a captured graph; make a plan, and a graph, for each q_len"
        )

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: int,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        self._check(sinks, alibi_slopes)
        tokens, q_len = q.shape[0], payload
        rows = min(tokens // q_len, step.batch) if q_len else 0
        if not rows:
            return nothing(q, self._request.v_head_dim, return_lse)
        used = rows * q_len
        found = self._with_kvcache(
            (q if used == tokens else q[:used]).view(rows, q_len, *q.shape[1:]),
            *self._caches(k_cache, v_cache),
            cache_seqlens=step.kv_lens if rows == step.batch else step.kv_lens[:rows],
            block_table=step.block_table if rows == step.batch else step.block_table[:rows],
            alibi_slopes=alibi_slopes,
            return_softmax_lse=return_lse,
        )
        out = (found[0] if return_lse else found).flatten(0, 1)
        out = out if used == tokens else functional.pad(out, (0, 0, 0, 0, 0, tokens - used))
        if not return_lse:
            return out
        lse = without_keys(found[1]).transpose(1, 2).flatten(0, 1)
        return out, lse if used == tokens else functional.pad(lse, (0, 0, 0, tokens - used), value=-float("inf"))
