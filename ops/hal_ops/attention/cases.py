"""Inputs for attention: hard lengths, poisoned caches, permuted and shared pages, and what is right for them.

:func:`make_case` draws random values. :func:`indicator_case` reads a kernel's mask out of it, bit by bit: with q = 0
every key that is seen weighs the same, and with v one-hot in the key's position the output is the mask itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._op import resolve_target
from hal_ops._request import AUTO
from hal_ops.attention import masks
from hal_ops.attention.contract import Step
from hal_ops.attention.fresh_inputs import fresh_inputs
from hal_ops.attention.op import ATTENTION
from hal_ops.attention.paged_inputs import block_tables, build_cache, make_step, scales, slots_of
from hal_ops.attention.request import AttentionRequest
from hal_ops.attention.work import CountedCase
from hal_ops.compare import Comparison, compare, compare_lse

__all__ = ["AttentionCase", "hard_lengths", "indicator_case", "make_case", "moved", "rounded", "visible_keys"]

LENGTHS = (1, 5, 9, 15, 16, 17, 25, 33)
SCALES = ("normal", "large", "outliers")
LARGE_LOGIT = 12.0
"""Standard deviation of the logits of a large case: among a few dozen keys the largest reach 30 to 50."""


@dataclasses.dataclass(frozen=True)
class AttentionCase(CountedCase):
    """Inputs of one call. ``args`` and ``kwargs`` are what an implementation gets, but for a paged one's payload.

    ``lengths`` are (q_len, kv_len) a sequence; ``oracle`` is the device that :meth:`expected` computes on.
    """

    request: AttentionRequest
    phase: str
    label: str
    lengths: tuple[tuple[int, int], ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    oracle: str = "cpu"

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """Calls what a kernel's factory returned as a handle does: a paged one is asked for its plan first, and what a
        prefill kernel binds for q, k and v alone is called where there is nothing else."""
        alone = all(value is None or value is False for value in self.kwargs.values())
        if self.phase == "prefill" and alone and hasattr(implementation, "for_dense"):
            return {"out": implementation.for_dense(*self.args)(*self.args)}
        args = self.args if self.phase == "prefill" else (*self.args, implementation.plan(self.args[3]))  # type: ignore[attr-defined]
        result = implementation(*args, **self.kwargs)
        return {"out": result[0], "lse": result[1]} if self.request.return_lse else {"out": result}

    def expected(self) -> dict[str, Tensor]:
        """out (and lse, if the request returns it) in float64."""
        return self._oracle(torch.float64)

    def low_precision(self) -> dict[str, Tensor]:
        """What plain torch makes of the same formula with every step rounded to the request's dtype.

        Where the request permits it, q is rounded to the cache's format first.
        """
        request = self.request
        case = self
        if request.fp8_query and self.phase != "prefill" and is_fp8(request.kv_dtype):
            case = dataclasses.replace(self, args=(rounded(self.args[0], request.kv_dtype), *self.args[1:]))
        return case._oracle(torch_dtype(request.dtype))

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Compares out (and lse) by the gates of :mod:`hal_ops.compare`."""
        found, right, low = self.call(implementation), self.expected(), self.low_precision()
        request, fresh = self.request, self.phase == "prefill"
        read = request.qkv_dtype if fresh else request.kv_dtype
        dtype = read if is_fp8(read) else request.dtype
        rounds = is_fp8(read) and (fresh or request.fp8_query)
        slack = 2.0 if rounds else 1.5 if request.softcap else 1.0
        name = f"{self.phase} {self.label}"
        wanted = torch_dtype(self.request.dtype)
        if found["out"].dtype != wanted:
            fault = f"its dtype is {found['out'].dtype}; the contract says {wanted}"
            return (Comparison(f"{name}: out", (fault,)),)
        results = [compare(found["out"], right["out"], low["out"], dtype=dtype, name=f"{name}: out", slack=slack)]
        if "lse" in found:
            loose = 2.0 if rounds and not fresh else 1.0
            results.append(compare_lse(found["lse"], right["lse"], dtype=dtype, name=f"{name}: lse", slack=loose))
        return tuple(results)

    def _oracle(self, accumulate: torch.dtype) -> dict[str, Tensor]:
        factory = resolve_target(ATTENTION.reference[self.phase])
        there = dataclasses.replace(
            self,
            args=tuple(moved(x, self.oracle) for x in self.args),
            kwargs={name: moved(x, self.oracle) for name, x in self.kwargs.items()},
        )
        return there.call(factory(self.request, self.oracle, accumulate=accumulate, rounded=False))


def rounded(q: Tensor, name: str) -> Tensor:
    """q as an FP8 format holds it, with one scale: the coarsest of what kernels are permitted."""
    fp8 = torch_dtype(name)
    scale = q.float().abs().max().clamp_min(1e-12) / torch.finfo(fp8).max
    return ((q / scale).to(fp8).float() * scale).to(q.dtype)


def moved(value: Any, device: str) -> Any:
    """A tensor, or a step's tensors, on another device; anything else as it is."""
    if isinstance(value, Step):
        fields = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return Step(**fields)
    return value.to(device) if isinstance(value, Tensor) else value


def hard_lengths(request: AttentionRequest, phase: str) -> tuple[tuple[int, int], ...]:
    """(q_len, kv_len) pairs that have broken kernels: around tiles and pages, zero, one, more queries than keys."""
    if phase == "prefill":
        same = tuple((n, n) for n in LENGTHS)
        return (*same[:4], (0, 0), *same[4:], (0, 7), (8, 33), (7, 0), (1, 17), (9, 4))
    size = 16 if request.page_size == AUTO else int(request.page_size)
    kv_lens = sorted({*LENGTHS, size + 1, size, max(1, size - 1), 2 * size + 1})
    if phase == "decode":
        return tuple((request.max_q_len, max(n, request.max_q_len)) for n in kv_lens)
    pairs = tuple((min(n, (1, n, n // 2 + 1, 8)[i % 4]), n) for i, n in enumerate(kv_lens))
    return (*pairs[:3], (0, 0), *pairs[3:], (0, 5), (8, 9), (1, 2 * size + 3))


def make_case(
    request: AttentionRequest,
    phase: str,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    lengths: Sequence[tuple[int, int]] | None = None,
    scale: str = "normal",
    form: str = "ragged",
    interleaved: bool = False,
    oracle: str = "cpu",
) -> AttentionCase:
    """A case of random values.

    Args:
        lengths: (q_len, kv_len) a sequence; default :func:`hard_lengths`.
        scale: ``"normal"`` N(0, 1); ``"large"`` scales q until logits reach 30 to 50; ``"outliers"`` adds N(0, 100) to
            one element in a thousand.
        form: prefill as ``"ragged"`` or as ``"dense"`` (default lengths: two sequences of 33).
        interleaved: K and V are views of one ``[num_pages, 2, ...]`` tensor; needs ``v_head_dim == head_dim``.
        oracle: where the expected values are computed.

    Raises:
        ValueError: lengths, scale or form do not fit.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
    lengths = tuple(lengths or (((33, 33),) * 2 if form == "dense" else hard_lengths(request, phase)))
    draw = torch.Generator().manual_seed(seed)
    q = _values((sum(q for q, _ in lengths), request.num_q_heads, request.head_dim), scale, draw)
    if scale == "large":
        q *= LARGE_LOGIT / (request.softmax_scale * request.head_dim**0.5)

    def keys(positions: Tensor, dim: int) -> Tensor:
        return _values((len(positions), request.num_kv_heads, dim), scale, draw)

    label = f"{scale}, seed {seed}, {'interleaved, ' * interleaved}lengths {_shown(lengths)}"
    return _build(request, phase, label, lengths, q, keys, keys, draw, form, interleaved, device, oracle)


def indicator_case(
    request: AttentionRequest,
    phase: str,
    *,
    device: torch.device | str = "cpu",
    lengths: Sequence[tuple[int, int]] | None = None,
    form: str = "ragged",
) -> AttentionCase:
    """q = 0 and v one-hot in the key's position: where out is above 0, the key was seen. See :func:`visible_keys`.

    Raises:
        ValueError: a sequence has more keys than ``v_head_dim``.
    """
    lengths = tuple(lengths or (((33, 33),) * 2 if form == "dense" else hard_lengths(request, phase)))
    longest = max(kv for _, kv in lengths)
    if longest > request.v_head_dim:
        raise ValueError(f"{longest} keys do not fit a one-hot v of {request.v_head_dim} elements: shorten the lengths")
    draw = torch.Generator().manual_seed(0)
    q = torch.zeros(sum(q for q, _ in lengths), request.num_q_heads, request.head_dim)

    def keys(positions: Tensor, dim: int) -> Tensor:
        return torch.randn(len(positions), request.num_kv_heads, dim, generator=draw)

    def one_hot(positions: Tensor, dim: int) -> Tensor:
        return torch.eye(dim)[positions].unsqueeze(1).expand(-1, request.num_kv_heads, -1)

    label = f"indicator, lengths {_shown(lengths)}"
    return _build(request, phase, label, lengths, q, keys, one_hot, draw, form, False, device, "cpu")


def visible_keys(case: AttentionCase) -> Tensor:
    """Which keys each token of the case may see: bool ``[tokens, most keys]``, to be held against ``out > 0``."""
    limits = masks.sides(case.request.causal, case.request.window)
    seen = torch.zeros(sum(q for q, _ in case.lengths), case.request.v_head_dim, dtype=torch.bool)
    start = 0
    for q_len, kv_len in case.lengths:
        seen[start : start + q_len, :kv_len] = masks.visible(masks.relative(q_len, kv_len, kv_len - q_len), limits)
        start += q_len
    return seen


def _values(size: tuple[int, ...], scale: str, draw: torch.Generator) -> Tensor:
    x = torch.randn(size, generator=draw)
    if scale == "outliers":
        x += torch.randn(size, generator=draw) * 10 * (torch.rand(size, generator=draw) < 1e-3)
    return x


def _shown(lengths: Sequence[tuple[int, int]]) -> str:
    text = " ".join(f"{q}/{kv}" for q, kv in lengths[:6])
    return text + (f" and {len(lengths) - 6} more" if len(lengths) > 6 else "")


Keys = Callable[[Tensor, int], Tensor]


def _build(
    request: AttentionRequest,
    phase: str,
    label: str,
    lengths: tuple[tuple[int, int], ...],
    q: Tensor,
    k: Keys,
    v: Keys,
    draw: torch.Generator,
    form: str,
    interleaved: bool,
    device: torch.device | str,
    oracle: str,
) -> AttentionCase:
    kwargs: dict[str, Any] = {"return_lse": request.return_lse}
    heads = request.num_q_heads
    if request.sinks:
        kwargs["sinks"] = torch.randn(heads, generator=draw) + 2.0
    if request.alibi:
        kwargs["alibi_slopes"] = 0.5 * torch.rand(heads, generator=draw) + 0.05
    if phase == "prefill":
        positions = torch.cat([torch.arange(kv) for _, kv in lengths])
        args = fresh_inputs(
            request, lengths, (q, k(positions, request.head_dim), v(positions, request.v_head_dim)), form, kwargs
        )
    else:
        q = q.to(torch_dtype(request.dtype))
        args = _paged_args(request, lengths, q, k, v, draw, str(device) if interleaved else None, kwargs)
    args, kwargs = tuple(moved(x, str(device)) for x in args), {n: moved(x, str(device)) for n, x in kwargs.items()}
    return AttentionCase(request, phase, label, lengths, args, kwargs, oracle)


def _paged_args(
    request: AttentionRequest,
    lengths: tuple[tuple[int, int], ...],
    q: Tensor,
    k: Keys,
    v: Keys,
    draw: torch.Generator,
    interleaved_on: str | None,
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    size = int(request.page_size)
    table, num_pages = block_tables(lengths, size, draw)
    slots = torch.cat([slots_of(row, size, 0, kv) for row, (_, kv) in zip(table, lengths, strict=True)])
    positions = torch.cat([torch.arange(kv) for _, kv in lengths])
    caches = []
    for name, fill, dim, first in (("k_scale", k, request.head_dim, 0.5), ("v_scale", v, request.v_head_dim, 2.0)):
        scale = scales(request, first)
        if scale is not None:
            kwargs[name] = scale
        keys = name == "k_scale"
        caches.append(build_cache(slots, fill(positions, dim), num_pages, request, scale, keys=keys))
    if interleaved_on is not None:
        bits = torch.uint8 if is_fp8(request.kv_dtype) else caches[0].dtype
        both = torch.stack([cache.view(bits).flatten(1) for cache in caches], 1).to(interleaved_on)
        caches = [half.view(x.shape).view(x.dtype) for half, x in zip(both.unbind(1), caches, strict=True)]
    step = make_step([q for q, _ in lengths], [kv for _, kv in lengths], table, size)
    return (q, *caches, step)
