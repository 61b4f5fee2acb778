"""Wrong kernels are caught. Each mutant has a fault that real kernels had; the default cases must show it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hal_ops import torch_dtype
from hal_ops.attention import PHASES, AttentionRequest, reference
from hal_ops.attention.cases import SCALES, make_case
from hal_ops.attention.contract import Step

RequestOf = Callable[..., AttentionRequest]
BUSY: dict[str, Any] = {"softcap": 30.0, "window": 16, "sinks": True, "alibi": True, "return_lse": True, "max_q_len": 4}


class Mutant:
    """The reference of a changed request, with its arguments and results changed on the way."""

    def __init__(
        self,
        request: AttentionRequest,
        phase: str,
        *,
        fields: Mapping[str, Any] | None = None,
        step: Callable[[Step], Step] = lambda step: step,
        kwargs: Callable[[dict[str, Any]], dict[str, Any]] = lambda kwargs: kwargs,
        tensors: Callable[..., tuple[Tensor, ...]] = lambda *tensors: tensors,
        result: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda out, lse: (out, lse),
    ) -> None:
        self.inner: Any = getattr(reference, phase)(request.replace(**(fields or {})), "cpu")
        self.step, self.kwargs, self.tensors, self.result = step, kwargs, tensors, result

    def plan(self, step: Step) -> None:
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tensors = self.tensors(*args[:3])
        rest = tuple(self.step(x) if isinstance(x, Step) else x for x in args[3:])
        found = self.inner(*tensors, *rest, **self.kwargs(dict(kwargs)))
        return self.result(*found)


def caught(request: AttentionRequest, phase: str, **mutation: Any) -> bool:
    """Whether one of the default cases shows the fault. Where there is none, all must be right."""
    verdicts = []
    for scale in SCALES:
        case = make_case(request, phase, scale=scale)
        assert all(c.ok for c in case.check(Mutant(request, phase))), "the bounds are too tight for a right kernel"
        verdicts += case.check(Mutant(request, phase, **mutation))
    assert all(c.failures or c.ok for c in verdicts)
    return not all(c.ok for c in verdicts)


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, name: None}


def slopes_by(factor: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, "alibi_slopes": kwargs["alibi_slopes"] * factor}


def row_scaled(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    out = out.clone()
    out[len(out) // 2, 1] *= 1.1
    return out, lse


def heads_blocked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Query head h reads kv head h modulo their number, not h over the group."""
    order = torch.arange(q.shape[1]).view(2, -1).t().flatten()
    return q[:, order], k, v


def first_keys_lost(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A group that reads one kv head for all."""
    return q, k.clone().index_fill_(1, torch.tensor([1]), 0.0), v


MUTANTS: dict[str, dict[str, Any]] = {
    "softcap dropped": {"fields": {"softcap": 0.0}},
    "softcap doubled": {"fields": {"softcap": 60.0}},
    "window one less": {"fields": {"window": 15}},
    "window one more": {"fields": {"window": 17}},
    "window dropped": {"fields": {"window": None}},
    "not causal": {"fields": {"causal": False, "window": (15, None)}},
    "scale five percent off": {"fields": {"softmax_scale": 1.05 / math.sqrt(32)}},
    "scale left out": {"fields": {"softmax_scale": 1.0}},
    "sinks dropped": {"fields": {"sinks": False}, "kwargs": without("sinks")},
    "alibi dropped": {"fields": {"alibi": False}, "kwargs": without("alibi_slopes")},
    "alibi upside down": {"kwargs": slopes_by(-1.0)},
    "lse to base 2": {"result": lambda out, lse: (out, lse / math.log(2))},
    "lse without the sink": {"result": lambda out, lse: (out, lse - 0.01)},
    "one row of one head": {"result": row_scaled},
    "two heads exchanged": {"result": lambda out, lse: (out[:, [1, 0, *range(2, 6)]], lse)},
    "output in float64": {"result": lambda out, lse: (out.double(), lse)},
    "output in another shape": {"result": lambda out, lse: (out.flatten(1), lse)},
    "NaN in one place": {"result": lambda out, lse: (out.index_fill(0, torch.tensor([3]), torch.nan), lse)},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("phase", PHASES)
def test_mutants(request_of: RequestOf, phase: str, dtype: str) -> None:
    # requirement X20, P23, P24, B15, E8
    request = request_of(dtype=dtype, **BUSY)
    missed = [name for name, mutation in MUTANTS.items() if not caught(request, phase, **mutation)]
    assert not missed


@pytest.mark.parametrize("phase", PHASES)
def test_wrong_kv_heads(request_of: RequestOf, phase: str) -> None:
    request = request_of(dtype="bfloat16", return_lse=True, num_q_heads=6, num_kv_heads=2)
    assert caught(request, phase, tensors=heads_blocked)
    if phase == "prefill":
        assert caught(request, phase, tensors=first_keys_lost)


def top_left(step: Step) -> Step:
    """As many keys as queries, the first ones: what a mask aligned to the first key lets through."""
    return dataclasses.replace(step, kv_lens_host=tuple(map(min, step.q_lens, step.kv_lens_host)))


def whole_pages(step: Step) -> Step:
    size = step.page_size
    return dataclasses.replace(step, kv_lens_host=tuple(-(-n // size) * size for n in step.kv_lens_host))


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_paged_mutants(request_of: RequestOf, phase: str) -> None:
    # requirement D15, P32, D8
    request = request_of(dtype="bfloat16", return_lse=True)
    assert caught(request, phase, step=top_left)
    assert caught(request, phase, step=whole_pages)
    assert caught(
        request, phase, step=lambda s: dataclasses.replace(s, block_table=s.block_table.roll(1, 0).clamp(0, 3))
    )
    square = request_of(dtype="bfloat16", num_q_heads=16, num_kv_heads=16, page_size=16, return_lse=True)
    assert caught(square, phase, fields={"kv_layout": "HND"})


def test_top_left_prefill(request_of: RequestOf) -> None:
    request = request_of(return_lse=True, num_kv_heads=6)

    def wrong(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return out, right["lse"]

    case = make_case(request, "prefill", lengths=((7, 20),) * 2, form="dense")
    right = case.call(reference.prefill(request, "cpu"))
    out, lse = case.check(wrong)
    assert lse.ok
    assert not out.ok
    assert "the bound is" in out.report()


@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_fp8_mutants(request_of: RequestOf, phase: str, kv_scale: str) -> None:
    # requirement B6, D12, P29
    request = request_of(dtype="bfloat16", kv_dtype="float8_e4m3fn", kv_scale=kv_scale, return_lse=True)
    assert caught(request, phase, kwargs=without("k_scale"))
    assert caught(request, phase, kwargs=without("v_scale"))

    def read_as(dtype: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda q, k, v: (q, k.view(torch_dtype(dtype)), v.view(torch_dtype(dtype)))

    for other in ("float8_e4m3fnuz", "float8_e5m2"):
        assert caught(request, phase, tensors=read_as(other))
    if kv_scale == "head":
        assert caught(request, phase, kwargs=lambda kwargs: {**kwargs, "v_scale": kwargs["v_scale"][:1]})


def test_empty_rows_are_told_apart(request_of: RequestOf) -> None:
    """Out 0 and lse -inf: neither the mean of v, nor 0, nor +inf."""
    request = request_of(return_lse=True)
    for lse_of, out_of in ((0.0, 0.0), (torch.inf, 0.0), (-torch.inf, 0.5), (-torch.inf, torch.nan)):

        def result(out: Tensor, lse: Tensor, lse_of: float = lse_of, out_of: float = out_of) -> tuple[Tensor, Tensor]:
            empty = lse == -torch.inf
            assert empty.any()
            return out.masked_fill(empty.unsqueeze(-1), out_of), lse.masked_fill(empty, lse_of)

        assert caught(request, "prefill", result=result)
