"""Inputs for latent attention: attention's hard lengths and poisoned pages, with one tensor of entries as the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._op import resolve_target
from hal_ops.attention import cases
from hal_ops.case import Case
from hal_ops.compare import Comparison, compare, compare_lse
from hal_ops.mla_attention.op import MLA_ATTENTION
from hal_ops.mla_attention.request import MlaAttentionRequest

__all__ = ["MlaCase", "make_case"]


@dataclasses.dataclass(frozen=True)
class MlaCase(Case):
    """Inputs of one call: ``args`` are q, cache and step; ``oracle`` is the device that :meth:`expected` computes on.

    An FP8 cache has its scale in ``kwargs``, as ``kv_scale``.
    """

    request: MlaAttentionRequest
    phase: str
    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    oracle: str = "cpu"

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """Asks what a kernel's factory returned for its plan, and calls it."""
        payload = implementation.plan(self.args[2])  # type: ignore[attr-defined]
        result = implementation(*self.args, payload, **self.kwargs)
        return {"out": result[0], "lse": result[1]} if self.kwargs["return_lse"] else {"out": result}

    def expected(self) -> dict[str, Tensor]:
        """out (and lse) in float64."""
        return self._oracle(torch.float64)

    def low_precision(self) -> dict[str, Tensor]:
        """What plain torch makes of the same formula with every step rounded to the request's dtype.

        Where the request permits it, q is rounded to the cache's format first.
        """
        case = self
        if self._fp8_query:
            case = dataclasses.replace(self, args=(cases.rounded(self.args[0], self.request.kv_dtype), *self.args[1:]))
        return case._oracle(torch_dtype(self.request.dtype))

    @property
    def _fp8_query(self) -> bool:
        return self.request.fp8_query and is_fp8(self.request.kv_dtype)

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Compares out (and lse) by the gates of :mod:`hal_ops.compare`."""
        found, right, low = self.call(implementation), self.expected(), self.low_precision()
        dtype, name = self.request.dtype, f"{self.phase} {self.label}"
        if found["out"].dtype != torch_dtype(dtype):
            fault = f"its dtype is {found['out'].dtype}; the contract says {torch_dtype(dtype)}"
            return (Comparison(f"{name}: out", (fault,)),)
        computed, slack = (self.request.kv_dtype, 2.0) if self._fp8_query else (dtype, 1.0)
        results = [compare(found["out"], right["out"], low["out"], dtype=computed, name=f"{name}: out", slack=slack)]
        if "lse" in found:
            results.append(compare_lse(found["lse"], right["lse"], dtype=computed, name=f"{name}: lse"))
        return tuple(results)

    def _oracle(self, accumulate: torch.dtype) -> dict[str, Tensor]:
        factory = resolve_target(MLA_ATTENTION.reference[self.phase])
        there = dataclasses.replace(
            self,
            args=tuple(cases.moved(x, self.oracle) for x in self.args),
            kwargs={name: cases.moved(x, self.oracle) for name, x in self.kwargs.items()},
        )
        return there.call(factory(self.request, self.oracle, accumulate=accumulate, rounded=False))


def make_case(
    request: MlaAttentionRequest,
    phase: str,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    lengths: Sequence[tuple[int, int]] | None = None,
    scale: str = "normal",
    oracle: str = "cpu",
) -> MlaCase:
    """A case of random values; the arguments are those of :func:`hal_ops.attention.cases.make_case`.

    Raises:
        ValueError: lengths or scale do not fit.
    """
    made = cases.make_case(request.absorbed(), phase, device=device, seed=seed, lengths=lengths, scale=scale)
    q, entries, _, step = made.args
    kwargs = {"return_lse": made.kwargs["return_lse"]}
    if "k_scale" in made.kwargs:
        kwargs["kv_scale"] = made.kwargs["k_scale"]
    return MlaCase(request, phase, made.label, (q, entries.squeeze(2), step), kwargs, oracle)


def _variants(request: MlaAttentionRequest, phase: str) -> tuple[dict[str, Any], ...]:
    # Of a logit of 40, FP8 queries are off by one: whichever of two keys then wins is no error of the kernel.
    rounded = request.fp8_query and is_fp8(request.kv_dtype)
    return ({"scale": "outliers"},) if rounded else ({"scale": "large"}, {"scale": "outliers"})


make_case.variants = _variants  # type: ignore[attr-defined]
