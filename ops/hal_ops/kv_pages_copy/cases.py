"""Inputs for the copy of pages: pages read twice, pairs skipped, caches that hold NaN among their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.case import Case
from hal_ops.compare import Comparison
from hal_ops.kv_cache.cases import bits_of
from hal_ops.kv_pages_copy.op import KvPagesCopyRequest
from hal_ops.kv_pages_copy.reference import kv_pages_copy

__all__ = ["KvPagesCopyCase", "make_case"]

NUM_PAGES = 9


@dataclasses.dataclass(frozen=True)
class KvPagesCopyCase(Case):
    """Each call works on fresh caches; ``interleaved`` ones are views of one tensor."""

    request: KvPagesCopyRequest
    label: str
    k_cache: Tensor
    v_cache: Tensor
    source: Tensor
    target: Tensor
    interleaved: bool

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """The caches after the copy."""
        caches = (self.k_cache.clone(), self.v_cache.clone())
        if self.interleaved:
            both = torch.stack([bits_of(x) for x in caches], 1).unbind(1)
            caches = (both[0].view(self.k_cache.dtype), both[1].view(self.v_cache.dtype))
        implementation(*caches, self.source, self.target)
        return {"k_cache": caches[0], "v_cache": caches[1]}

    def expected(self) -> dict[str, Tensor]:
        """The caches after the reference's copy."""
        return self.call(kv_pages_copy(self.request, self.k_cache.device))

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Every bit of both caches."""
        found, right = self.call(implementation), self.expected()
        wrong = {n: bits_of(found[n]).ne(bits_of(right[n])).flatten(1).any(1) for n in found}
        return tuple(
            Comparison(f"{self.label}: {n}", (f"pages {w.nonzero().flatten().tolist()} differ",) if w.any() else ())
            for n, w in wrong.items()
        )


def make_case(
    request: KvPagesCopyRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    interleaved: bool = False,
) -> KvPagesCopyCase:
    """Nine pages of random values and NaN; int32 pages for odd seeds, int64 for even ones.

    Raises:
        ValueError: ``interleaved`` with unequal head dims.
    """
    if interleaved and request.head_dim != request.v_head_dim:
        raise ValueError("interleaved caches need v_head_dim == head_dim")
    draw = torch.Generator().manual_seed(seed)
    rows = (request.page_size, request.num_kv_heads)
    middle = rows if request.kv_layout == "NHD" else rows[::-1]
    caches = []
    for dim in (request.head_dim, request.v_head_dim):
        values = torch.randn(NUM_PAGES, *middle, dim, generator=draw)
        values.view(-1)[::11] = torch.nan
        caches.append(values.to(torch_dtype(request.kv_dtype)).to(device))
    order = torch.randperm(NUM_PAGES, generator=draw).to(torch.int32 if seed % 2 else torch.int64)
    source = torch.stack([order[0], order[0], order[1], order[2] * 0 - 1, order[3]]).to(device)
    target = torch.stack([order[4], order[5], order[6], order[7], order[8] * 0 - 1]).to(device)
    label = f"{request.op} {request.kv_dtype} {request.kv_layout}, seed {seed}"
    return KvPagesCopyCase(request, label, caches[0], caches[1], source, target, interleaved)


def _variants(request: KvPagesCopyRequest, phase: str) -> tuple[dict[str, Any], ...]:
    return ({"interleaved": True},) if request.head_dim == request.v_head_dim else ()


make_case.variants = _variants  # type: ignore[attr-defined]
