"""Prefill through flashinfer's wrapper for ragged keys.

The wrapper plans from lengths on the host. Those of a dense call are its shapes, and a plan knows its own; lengths
that are only on the device have to be fetched, once a call.

A row that sees no key is not left to the library: fa2 gives out 0 there, fa3 the mean of the values, and the LSE of
both is a finite stand-in that depends on the scale (flashinfer 0.6.13, ``attention/prefill.cuh`` and
``hopper/attention_updater.cuh``). Which rows those are follows from the lengths.

Of a sequence with more queries than keys fa2 masks too little: the first block to mask is counted in unsigned numbers,
``kv_len + tile - qo_len`` (0.6.13, ``prefill.cuh:1781`` and ``:2256``), which wraps, and the tile that sees the first keys
sees too many (200 queries of 100 keys, on an H200). Queries that see no key are left out of the call.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._flashinfer_pool import Lease
from hal_nvidia._flashinfer_reads import refuse_far, refuse_many
from hal_nvidia._flashinfer_tables import cumulative
from hal_ops.attention import AttentionRequest, Step

__all__ = ["Prefill"]

_LN_2 = math.log(2.0)
_KEPT_SHAPES = 8


class Prefill:
    """The prefill phase: a callable of the contract, and :meth:`for_step`, which plans one for all layers of a step."""

    def __init__(
        self, request: AttentionRequest, device: hal.Device, make: functools.partial[Any], arguments: Mapping[str, Any]
    ) -> None:
        self._request = request
        self._device = device
        self._place = device.torch_device()
        self._make = make
        self._arguments = dict(arguments)
        self._narrow = make.keywords["backend"] == "fa2"
        self._dense: collections.OrderedDict[tuple[int, ...], Planned] = collections.OrderedDict()
        self._planned([1], [1])

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
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return self._call_dense(q, k, v, return_lse)
        q_lens, kv_lens = (_lengths(x) for x in (cu_seqlens_q, cu_seqlens_k))
        return self._planned(q_lens, kv_lens)(q, k, v, return_lse=return_lse)

    def for_step(self, step: Step) -> Planned:
        """A callable like this one for a step whose keys are its queries' own, planned from its host lengths."""
        return self._planned(step.q_lens, step.q_lens)

    def for_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[Tensor, Tensor, Tensor], Any]:
        """A callable for tensors that are alike: it plans once a stream."""
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        if self._narrow:
            refuse_far(q, k, v)
        size = (batch, q_len, self._request.num_q_heads, self._request.v_head_dim)
        rows_of_q, rows_of_k, rows_of_v = (_rows_of(x) for x in (q, k, v))
        place, shaped = self._place, operator.methodcaller("view", size)
        if batch == 1:
            shaped = operator.methodcaller("unsqueeze", 0)

        def planned() -> tuple[int, Callable[..., Any], Planned]:
            plan = self._dense_plan(batch, q_len, kv_len)
            return pool.stream_of(place), plan.alike(), plan

        known = planned()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            nonlocal known
            stream, run, _ = known
            if stream != pool.stream_of(place):
                _, run, _ = known = planned()
            return shaped(run(rows_of_q(q), rows_of_k(k), rows_of_v(v)))

        return call

    def _call_dense(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        found = self._dense_plan(q.shape[0], q.shape[1], k.shape[1])(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), return_lse=return_lse
        )
        if not return_lse:
            return found.unflatten(0, q.shape[:2])
        return tuple(x.unflatten(0, q.shape[:2]) for x in found)

    def _dense_plan(self, batch: int, q_len: int, kv_len: int) -> Planned:
        """The plan of a shape: it depends on these numbers alone, and on the stream, whose buffers it uses."""
        key = (pool.stream_of(self._place), batch, q_len, kv_len)
        found = self._dense.pop(key, None) or self._planned([q_len] * batch, [kv_len] * batch)
        self._dense[key] = found
        if len(self._dense) > _KEPT_SHAPES:
            self._dense.popitem(last=False)
        return found

    def _planned(self, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Planned:
        holes = list(_unseeing(q_lens, kv_lens, self._request.causal))
        kept, planned = [], q_lens
        if holes and self._request.causal and self._narrow:
            kept = list(_seeing(q_lens, kv_lens))
            planned = [min(pair) for pair in zip(q_lens, kv_lens, strict=True)]
        if self._narrow:
            refuse_many(sum(planned), self._request.num_q_heads, self._request.head_dim)
            refuse_many(sum(kv_lens), self._request.num_kv_heads, self._request.head_dim)
        taken = self._pooled()
        if sum(planned):
            self._fill(taken, planned, kv_lens)
        if kept:
            return _Trimmed(taken, kept, sum(q_lens), self._request.v_head_dim, self._narrow)
        return Planned(taken, holes, sum(q_lens), self._request.v_head_dim, self._narrow)

    def _fill(self, taken: Lease, q_lens: Sequence[int], kv_lens: Sequence[int]) -> None:
        request = self._request
        taken.plan(
            lambda wrapper: wrapper.plan(
                cumulative(q_lens),
                cumulative(kv_lens),
                request.num_q_heads,
                request.num_kv_heads,
                request.head_dim,
                head_dim_vo=request.v_head_dim,
                **self._arguments,
            )
        )

    def _pooled(self) -> Lease:
        stream = pool.stream_of(self._place)
        buffer = pool.scratch(self._place, stream, pool.scratch_size(self._request, self._device))
        make = functools.partial(self._make, buffer)
        return pool.lease((*pool.identity(self._make), buffer.data_ptr(), str(self._place), stream), make)


class Planned:
    """Prefill with lengths that are known. The cumulative lengths of the call are those it was planned for."""

    def __init__(self, taken: Lease, holes: list[slice], tokens: int, v_head_dim: int, narrow: bool) -> None:
        self._lease = taken
        self._narrow = narrow
        self._near: tuple[Any, ...] | None = None
        self._run = taken.wrapper.run
        self._holes = holes
        self._tokens = tokens
        self._v_head_dim = v_head_dim

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
        if q.shape[0] != self._tokens or not self._tokens:
            return self._padded(q, k, v, return_lse)
        if self._narrow and not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            self._check_reach(q, k, v)
        return self._attend(q, k, v, return_lse)

    def _check_reach(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Look at the reach of tensors with gaps, once for those that are alike."""
        strides = q.stride(), k.stride(), v.stride()
        if strides != self._near:
            refuse_far(q, k, v)
            self._near = strides

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        found = self._run(q, k, v, return_lse=return_lse)
        out, lse = found if return_lse else (found, None)
        for hole in self._holes:
            out[hole] = 0.0
        if lse is None:
            return out
        lse.mul_(_LN_2)
        for hole in self._holes:
            lse[hole] = -math.inf
        return out, lse

    def alike(self) -> Callable[..., Any]:
        """What to call with q, k and v of the planned lengths, while this is alive: the library's own, if it fills all."""
        return self._run if type(self) is Planned and self._tokens and not self._holes else self

    def _padded(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        """A call with room for more tokens than there are, or without any: zeros where nothing is asked."""
        if q.shape[0] < self._tokens:
            raise ValueError(f"q has {q.shape[0]} tokens, and the plan is for {self._tokens}")
        out = q.new_zeros((*q.shape[:2], self._v_head_dim))
        lse = out.new_full(out.shape[:2], -math.inf, dtype=torch.float32)
        if self._tokens:
            part = self(*(x[: self._tokens] for x in (q, k, v)), return_lse=True)
            out[: self._tokens], lse[: self._tokens] = part
        return (out, lse) if return_lse else out


class _Trimmed(Planned):
    """The same for queries of which the library gets ``kept`` alone: tokens of each sequence, in its order."""

    def __init__(self, taken: Lease, kept: list[slice], tokens: int, v_head_dim: int, narrow: bool) -> None:
        super().__init__(taken, [], tokens, v_head_dim, narrow)
        self._kept = kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Any:
        out = q.new_zeros((*q.shape[:2], self._v_head_dim))
        lse = out.new_full(out.shape[:2], -math.inf, dtype=torch.float32)
        rows = torch.cat([q[part] for part in self._kept])
        if len(rows):
            found, scores = self._run(rows, k, v, return_lse=True)
            start = 0
            for part in self._kept:
                end = start + part.stop - part.start
                out[part] = found[start:end]
                lse[part] = scores[start:end] * _LN_2
                start = end
        return (out, lse) if return_lse else out


def _rows_of(x: Tensor) -> Callable[[Tensor], Tensor]:
    """``[batch, tokens, heads, dim]`` to ``[batch * tokens, heads, dim]``, for tensors that are like ``x``.

    Of all ways to a view ``as_strided`` with tuples costs least; a ``torch.Size`` is twice as dear.
    """
    rows = x.flatten(0, 1)
    if x.numel() and rows.data_ptr() != x.data_ptr():
        return operator.methodcaller("flatten", 0, 1)
    return operator.methodcaller("as_strided", tuple(rows.shape), rows.stride())


def _lengths(cumulated: Tensor) -> list[int]:
    """Lengths from cumulative ones. Waits for the device, unless they are on the host."""
    return [b - a for a, b in itertools.pairwise(cumulated.tolist())]


def _unseeing(q_lens: Sequence[int], kv_lens: Sequence[int], causal: bool) -> Iterator[slice]:
    """Tokens that see no key: with a causal mask a sequence's first ones, where it has more queries than keys."""
    start = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        count = max(0, q_len - kv_len) if causal else q_len * (kv_len == 0)
        if count:
            yield slice(start, start + count)
        start += q_len


def _seeing(q_lens: Sequence[int], kv_lens: Sequence[int]) -> Iterator[slice]:
    """The other tokens, of each sequence: with a causal mask its last ones."""
    for end, q_len, kv_len in zip(itertools.accumulate(q_lens), q_lens, kv_lens, strict=True):
        yield slice(end - min(q_len, kv_len), end)
