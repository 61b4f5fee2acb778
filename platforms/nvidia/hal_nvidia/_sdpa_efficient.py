"""torch's memory-efficient attention, dense and ragged, aligned to the last key by its own mask type.

The kernel takes ``[batch, len, heads, dim]``, or ``[1, tokens, heads, dim]`` with cumulative lengths. Its LSE is
``[rows, heads, longest]``, the last dim rounded up to 32.

Where a sequence has more queries than keys, the causal mask is wrong in *all* rows (seen on an H200 with torch 2.11):
the first ones, which see no key, are made a sequence of their own, without keys. Of such a sequence neither a wide
output nor the gradient of q is ever written (``kernel_forward.h``, ``kernel_backward.h``): both are masked.

Keys and values of a sequence are found by ``iter_key_start * k_strideM`` in 32 bits, in the backward pass queries too
(``kernel_forward.h``, ``kernel_backward.h``). Past that other rows are read, without a word or with an illegal access
(torch 2.11.0 on an H200). So sequences that lie that far are refused; where a batch begins is found in 64 bits. Where an
LSE is to be written is found in 32 bits too (``batch_id * lse_dim * num_heads``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia._flash import nothing, sequences_of
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, PrefillAttention
from hal_ops.attention.reference import check_tensors

__all__ = ["prefill"]

forward = torch.ops.aten._efficient_attention_forward.default
_FULL, _CAUSAL = 0, 2
_FAR = 1 << 31
_WRITTEN = 128
"""Largest ``v_head_dim`` for which the kernel writes rows without keys."""


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    return _Prefill(request)


class _Prefill:
    def __init__(self, request: AttentionRequest) -> None:
        self._request = request
        self._causal = request.causal
        self._mask = _CAUSAL if request.causal else _FULL
        self._scale = request.softmax_scale
        self._needs_grad = request.needs_grad
        self._all_written = request.v_head_dim <= _WRITTEN
        self._near: tuple[Any, ...] | None = None

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """The operator itself, where each query sees a key."""
        if not q.numel() or not k.numel() or (self._causal and q.size(1) > k.size(1)):
            return self
        self._check_reach(q, k, v, q.size(1), k.size(1))
        refuse_wide(q.size(0), "sdpa_efficient")
        if self._needs_grad:
            refuse_many_lses(*q.shape[:3])
        mask, wanted, scale = self._mask, self._needs_grad, self._scale
        return lambda q, k, v: forward(q, k, v, None, None, None, None, None, 0.0, mask, wanted, scale=scale)[0]

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
        if sinks is not None or alibi_slopes is not None:
            check_tensors(self._request, sinks, alibi_slopes)
        if not q.numel() or not k.numel():
            return nothing(q, self._request.v_head_dim, return_lse)
        if cu_seqlens_q is None or cu_seqlens_k is None:
            self._check_reach(q, k, v, q.shape[1], k.shape[1])
            return self._dense(q, k, v, return_lse)
        bounds = max_seqlen_q or q.shape[0], max_seqlen_k or k.shape[0]
        self._check_reach(q, k, v, *bounds)
        return self._ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, bounds, return_lse)

    def _check_reach(self, q: Tensor, k: Tensor, v: Tensor, q_len: int, kv_len: int) -> None:
        """Look at how far sequences lie, once for those that are alike.

        Raises:
            ValueError: the kernel cannot reach all of one.
        """
        alike = q_len, kv_len, q.stride(), k.stride(), v.stride()
        if alike != self._near:
            for name, x, length in (("q", q, q_len), ("k", k, kv_len), ("v", v, kv_len)):
                refuse_far_sequence(name, x, length)
            self._near = alike

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        refuse_wide(q.size(0), "sdpa_efficient")
        empty = q.size(1) - k.size(1) if self._causal else 0
        q = q[:, empty:] if empty > 0 else q
        if wanted := return_lse or self._needs_grad:
            refuse_many_lses(*q.shape[:3])
        found = forward(q, k, v, None, None, None, None, None, 0.0, self._mask, wanted, scale=self._scale)
        out = functional.pad(found[0], (0, 0, 0, 0, empty, 0)) if empty > 0 else found[0]
        if not return_lse:
            return out
        lse = found[1][:, :, : q.shape[1]].transpose(1, 2)
        return out, functional.pad(lse, (0, 0, empty, 0), value=-torch.inf) if empty > 0 else lse

    def _ragged(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bounds: tuple[int, int], return_lse: bool
    ) -> Any:
        library = "sdpa_efficient"
        if self._causal and cu_q is not cu_k:
            cu_q, cu_k = without_first_queries(cu_q, cu_k)
            library += ", which makes two of each,"
        refuse_wide(cu_q.shape[0] - 1, library)
        if not return_lse and not self._needs_grad and self._all_written:
            return self._launch(q, k, v, cu_q, cu_k, bounds, False)[0][0]
        refuse_many_lses(cu_q.shape[0] - 1, bounds[0], q.shape[1])
        rows, places, empty = tokens(q.shape[0], cu_q, cu_k, bounds[0])
        if self._needs_grad:
            q = q.masked_fill(empty[:, None, None], 0.0)
        found = self._launch(q, k, v, cu_q, cu_k, bounds, True)
        # What is not all written has no gradient, so it may be changed in place.
        out = found[0][0] if self._all_written else found[0][0].masked_fill_(empty[:, None, None], 0.0)
        if not return_lse:
            return out
        return out, found[1][rows, :, places].masked_fill_(empty[:, None], -torch.inf)

    def _launch(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bounds: tuple[int, int], wanted: bool
    ) -> Any:
        return forward(q[None], k[None], v[None], None, cu_q, cu_k, *bounds, 0.0, self._mask, wanted, scale=self._scale)


def refuse_far_sequence(name: str, x: Tensor, length: int) -> None:
    """Refuse ``[..., length, heads, dim]`` of which the kernel cannot reach a sequence.

    Raises:
        ValueError: one lies over 2**31 elements or more.
    """
    reach = (length - 1) * x.stride(-3) + (x.shape[-2] - 1) * x.stride(-2) + x.shape[-1]
    if reach >= _FAR:
        raise ValueError(
            f"a sequence of {length} tokens of {name} {tuple(x.shape)} with strides {x.stride()} lies over {reach} "
            "elements, and torch's memory-efficient attention multiplies rows by strides in 32 bits: give it without gaps, "
            "or shorter, or force another library"
        )


def refuse_many_lses(sequences: int, longest: int, heads: int) -> None:
    """Refuse LSEs of which the kernel cannot reach the last.

    Raises:
        ValueError: they are 2**31 numbers or more.
    """
    count = sequences * heads * -(-longest // 32) * 32
    if count >= _FAR:
        raise ValueError(
            f"the LSEs of {sequences} sequences of up to {longest} queries of {heads} heads take {count} numbers, and "
            "torch's memory-efficient attention finds them in 32 bits: give fewer sequences at a time, or force another "
            "library"
        )


def without_first_queries(cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence as two: the queries that see no key, with no keys, and the others. Made on the device."""
    q_lens, kv_lens = cu_q.diff(), cu_k.diff()
    more = (q_lens - kv_lens).clamp_min(0)
    q_starts, k_starts = cu_q[:-1], cu_k[:-1]
    halves = torch.stack([q_starts, q_starts + more, k_starts, k_starts]).view(2, 2, -1).transpose(1, 2).flatten(1)
    both = torch.cat([halves, torch.stack([cu_q[-1:], cu_k[-1:]])], 1)
    return both[0], both[1]


def tokens(count: int, cu_q: Tensor, cu_k: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token its sequence, its place in it, and whether it has no key, as none has that is of no sequence.

    Nothing waits for the device.
    """
    numbers = torch.arange(count, device=cu_q.device, dtype=cu_q.dtype)
    rows = sequences_of(numbers, cu_q)
    empty = (cu_k.diff()[rows] == 0) | (numbers >= cu_q[-1])
    return rows, (numbers - cu_q[rows]).clamp_max(longest - 1), empty
