"""torch's cuDNN attention: dense batches, and ragged ones in pieces.

Its causal mask is aligned to the *first* key. So it is used where queries and keys are equally many; elsewhere rows are
cut off that see no key, or q is padded in front until both are equally many. A mask tensor would do as well, but with
one the backward pass gives NaN (pytorch/pytorch#196678).

Its backward pass refuses one query over one key ("s_q = s_kv = 1 is not supported", torch 2.11 on an H200). There the
weight is 1, and torch multiplies. Of sequences past 2**31 elements it gives wrong gradients of q and k, without a word
(torch 2.11.0, cuDNN 9.19.0, on an H200: right at 0.999 of that, wrong at 1.001, in each of six shapes): it gets fewer at
a time.

On 10.x devices it gives wrong values of one query, from 9.19 on (pytorch/pytorch#193893): torch's own choice leaves it out
there, whatever the heads are (pull request 194927, which names no version that is right). It gets a second query there,
of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from hal_nvidia._flash import nothing
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, PrefillAttention, Step
from hal_ops.attention.reference import check_tensors

__all__ = ["prefill"]

forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default

Pair = tuple[Tensor, "Tensor | None"]
_FAR_GRADIENTS = 1 << 31
_NO_SINGLE_QUERY = ("sm_100", "sm_103")


def prefill(request: AttentionRequest, device: hal.Device) -> PrefillAttention:
    """The prefill phase."""
    return _Prefill(request, device.arch.name in _NO_SINGLE_QUERY)


class _Prefill:
    def __init__(self, request: AttentionRequest, no_single_query: bool) -> None:
        self._request = request
        self._causal = request.causal
        self._scale = request.softmax_scale
        self.needs_grad = request.needs_grad
        self.no_single_query = no_single_query

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """One launch on views that are made in one step each, where cuDNN's own mask is right."""
        q_len, kv_len = q.shape[1], k.shape[1]
        if not q.numel() or not k.numel() or self.needs_grad or (self._causal and 1 < q_len != kv_len):
            return self
        if q_len == 1 and self.no_single_query:
            return self
        refuse_wide(q.shape[0], "sdpa_cudnn")
        (b, n, h, d), (m, g), e = q.shape, k.shape[1:3], v.shape[3]
        a, c, f = (tuple(x.stride(i) for i in (0, 2, 1, 3)) for x in (q, k, v))
        sizes, causal, scale = ((b, h, n, d), (b, g, m, d), (b, g, m, e)), self._causal and q_len > 1, self._scale
        return lambda q, k, v: forward(
            q.as_strided(sizes[0], a), k.as_strided(sizes[1], c), v.as_strided(sizes[2], f), None, False, 0.0, causal,
            False, scale=scale,
        )[0].transpose(1, 2)  # fmt: skip

    def for_step(self, step: Step) -> _Planned:
        """The same for one step: its lengths are known, so none is read from the device."""
        return _Planned(self, step.q_lens)

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
            out, lse = self._batch(q, k, v, return_lse)
        else:
            out, lse = self._ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), return_lse)
        return (out, lse) if return_lse else out

    def _square(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, return_lse: bool) -> Pair:
        """One launch, with cuDNN's own mask; several, without LSE, where gradients of one would be wrong."""
        if self.needs_grad and q.shape[0] > (most := self._sequences_at_a_time(q, k)):
            parts = zip(torch.split(q, most), torch.split(k, most), torch.split(v, most), strict=True)
            return torch.cat([self._square(*part, causal, False)[0] for part in parts]), None
        refuse_wide(q.shape[0], "sdpa_cudnn")
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        wanted = return_lse or self.needs_grad
        found = forward(q, k, v, None, wanted, 0.0, causal, False, scale=self._scale)
        # The LSE has a fourth dim of 1 since torch 2.9.
        return found[0].transpose(1, 2), found[1].reshape(q.shape[:3]).transpose(1, 2) if return_lse else None

    def _sequences_at_a_time(self, q: Tensor, k: Tensor) -> int:
        """How many sequences cuDNN finds the gradients of.

        Raises:
            ValueError: not even one.
        """
        request, longest = self._request, max(q.shape[1], k.shape[1])
        elements = longest * request.num_q_heads * max(request.head_dim, request.v_head_dim)
        if elements >= _FAR_GRADIENTS:
            raise ValueError(
                f"a sequence of {longest} tokens has {elements} elements, and cuDNN loses the gradients of q and k from "
                f"{_FAR_GRADIENTS} on: give shorter sequences, or force another library"
            )
        return (_FAR_GRADIENTS - 1) // elements

    def _lone_key(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        group = self._request.group_size
        scores = (q.float() * k.repeat_interleave(group, 2)).sum(-1) * self._scale
        weights = scores.unsqueeze(-1).softmax(-1).to(v.dtype)
        return weights * v.repeat_interleave(group, 2), scores

    def _batch(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Pair:
        """A dense batch, ``[batch, len, heads, dim]``, with any two lengths."""
        q_len, kv_len = q.shape[1], k.shape[1]
        if q_len == kv_len == 1 and (self.needs_grad or self.no_single_query):
            return self._lone_key(q, k, v)
        if q_len == 1 and self.no_single_query:
            out, lse = self._square(functional.pad(q, (0, 0, 0, 0, 1, 0)), k, v, False, return_lse)
            return out[:, 1:], None if lse is None else lse[:, 1:]
        if not self._causal or q_len == 1 or q_len == kv_len:
            return self._square(q, k, v, self._causal and q_len > 1, return_lse)
        if q_len < kv_len:
            more = kv_len - q_len
            out, lse = self._square(functional.pad(q, (0, 0, 0, 0, more, 0)), k, v, True, return_lse)
            return out[:, more:], None if lse is None else lse[:, more:]
        empty = q_len - kv_len
        out, lse = self._square(q[:, empty:], k, v, kv_len > 1, return_lse)
        out = functional.pad(out, (0, 0, 0, 0, empty, 0))
        return out, None if lse is None else functional.pad(lse, (0, 0, empty, 0), value=-torch.inf)

    def _ragged(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bounds: tuple[Any, Any], return_lse: bool
    ) -> Pair:
        """Rows of one length as a batch; others a call each."""
        rows = cu_q.shape[0] - 1
        if rows * (bounds[0] or 0) == q.shape[0] and rows * (bounds[1] or 0) == k.shape[0]:
            return self.even(q, k, v, rows, return_lse)
        return self.rows(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), return_lse)

    def even(self, q: Tensor, k: Tensor, v: Tensor, rows: int, return_lse: bool) -> Pair:
        """Rows of one length."""
        q, k, v = (x.view(rows, -1, *x.shape[1:]) for x in (q, k, v))
        out, lse = self._batch(q, k, v, return_lse)
        return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)

    def even_step(self, rows: int, length: int) -> Any:
        """Rows of one length, as many queries as keys: one launch, on views that are made in one step each."""
        refuse_wide(rows, "sdpa_cudnn")
        request = self._request
        causal, scale = self._causal and length > 1, self._scale
        q_size = rows, request.num_q_heads, length, request.head_dim
        k_size = rows, request.num_kv_heads, length, request.head_dim
        v_size = rows, request.num_kv_heads, length, request.v_head_dim
        size = rows * length, request.num_q_heads, request.v_head_dim

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            a, b, c = q.stride(), k.stride(), v.stride()
            out: Tensor = forward(
                q.as_strided(q_size, (length * a[0], a[1], a[0], a[2])),
                k.as_strided(k_size, (length * b[0], b[1], b[0], b[2])),
                v.as_strided(v_size, (length * c[0], c[1], c[0], c[2])),
                None, False, 0.0, causal, False, scale=scale,
            )[0]  # fmt: skip
            row, head, token, element = out.stride()
            if row == length * token:
                return out.as_strided(size, (token, head, element))
            return out.transpose(1, 2).flatten(0, 1)

        return call

    def rows(
        self, q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], return_lse: bool
    ) -> Pair:
        """A call a row."""
        wanted, stored = list(q_lens), list(kv_lens)
        queries, keys, values = torch.split(q, wanted), torch.split(k, stored), torch.split(v, stored)
        outs, lses = [], []
        for a, b, c in zip(queries, keys, values, strict=True):
            if a.shape[0]:
                out, lse = self._row(a, b, c, return_lse)
                outs.append(out)
                lses += [] if lse is None else [lse]
        return torch.cat(outs), torch.cat(lses) if return_lse else None

    def _row(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Pair:
        if not k.shape[0]:
            out, lse = nothing(q, self._request.v_head_dim, True)
            return out, lse if return_lse else None
        out, lse = self._batch(q[None], k[None], v[None], return_lse)
        return out[0], None if lse is None else lse[0]


class _Planned:
    """Prefill of a step whose keys are its queries' own. No request that cuDNN serves has sinks or slopes."""

    def __init__(self, prefill: _Prefill, lens: tuple[int, ...]) -> None:
        self._prefill = prefill
        self._lens = lens
        self._tokens = sum(lens)
        self._rows = len(lens) if self._tokens and len(set(lens)) == 1 else 0
        plain = self._rows and not prefill.needs_grad and (lens[0] > 1 or not prefill.no_single_query)
        self._even = prefill.even_step(self._rows, lens[0]) if plain else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Any:
        rest = q.shape[0] - self._tokens
        if not q.shape[0]:
            return self._prefill(q, k, v, return_lse=return_lse)
        if self._even is not None and not (rest or return_lse):
            return self._even(q, k, v)
        if self._rows and not rest:
            out, lse = self._prefill.even(q, k, v, self._rows, return_lse)
        else:
            lens = (*self._lens, rest) if rest else self._lens
            out, lse = self._prefill.rows(q, k, v, lens, lens, return_lse)
        return (out, lse) if return_lse else out
