"""Inputs for the gather: rows around the page size, empty ones, garbage in block tables, NaN in slots of no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._row_case import variants
from hal_ops.attention.paged_inputs import block_tables, slots_of
from hal_ops.case import Case
from hal_ops.compare import Comparison, compare
from hal_ops.kv_cache.reference import quantize
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest
from hal_ops.kv_pages_gather.reference import kv_pages_gather

__all__ = ["KvPagesGatherCase", "make_case"]


@dataclasses.dataclass(frozen=True)
class KvPagesGatherCase(Case):
    """``args`` and ``scales`` are those of the call."""

    request: KvPagesGatherRequest
    label: str
    args: tuple[Any, ...]
    scales: dict[str, Tensor]
    form: str

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        given: dict[str, Any] = dict(self.scales)
        if self.form == "out":
            shapes = [(self.args[4], self.request.num_kv_heads, x.shape[-1]) for x in self.args[:2]]
            dtype = torch_dtype(self.request.dtype)
            given["out"] = tuple(torch.full(s, torch.nan, dtype=dtype, device=self.args[0].device) for s in shapes)
        return dict(zip("kv", implementation(*self.args, **given), strict=True))

    def expected(self) -> dict[str, Tensor]:
        """Keys and values in float64, on the host."""
        args = tuple(x.cpu() if isinstance(x, Tensor) else x for x in self.args)
        scales = {name: x.cpu() for name, x in self.scales.items()}
        right = kv_pages_gather(self.request, "cpu", accumulate=torch.float64, rounded=False)
        return dataclasses.replace(self, args=args, scales=scales, form="plain").call(right)

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Equal bits where nothing is rounded; else within half a step of the format."""
        found, right = self.call(implementation), self.expected()
        return tuple(self._judge(name, found[name], right[name]) for name in found)

    def _judge(self, name: str, found: Tensor, right: Tensor) -> Comparison:
        title, wanted = f"{self.label}: {name}", torch_dtype(self.request.dtype)
        if found.dtype != wanted or not found.is_contiguous():
            fault = f"it is {found.dtype} with strides {found.stride()}; the contract says {wanted}, contiguous"
            return Comparison(title, (fault,))
        if self.request.dtype == self.request.kv_dtype and found.shape == right.shape:
            wrong = found.cpu().double().ne(right).flatten(1).any(1) if found.numel() else torch.zeros(0)
            return Comparison(title, (f"tokens {wrong.nonzero().flatten().tolist()} differ",) if wrong.any() else ())
        return compare(found, right, dtype=self.request.dtype, name=title)


def make_case(
    request: KvPagesGatherRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
) -> KvPagesGatherCase:
    """Random values. ``form``: ``"plain"``, ``"out"``, or ``"strided"``, where K and V are views of a larger tensor."""
    draw, size = torch.Generator().manual_seed(seed), request.page_size
    lens = (1, max(1, size - 1), 0, size, size + 1, 2 * size + 1)
    table, pages = block_tables([(0, n) for n in lens], size, draw)
    slots = torch.cat([slots_of(row, size, 0, n) for row, n in zip(table, lens, strict=True)])
    heads = request.num_kv_heads
    per = heads if request.kv_scale == "head" else 1
    scales = {}
    if is_fp8(request.kv_dtype):
        for name, first in (("k_scale", 0.5), ("v_scale", 2.0)):
            scales[name] = torch.tensor([first, 1 / first] * per)[:per]
    caches = []
    for name, dim in (("k_scale", request.head_dim), ("v_scale", request.v_head_dim)):
        flat = torch.full((pages * size, heads, dim), torch.nan)
        flat[slots] = torch.randn(len(slots), heads, dim, generator=draw)
        stored = quantize(flat, scales.get(name), request.kv_dtype).view(pages, size, heads, dim)
        caches.append(stored.transpose(1, 2).contiguous() if request.kv_layout == "HND" else stored)
    caches = [_inside(x.to(device)) if form == "strided" else x.to(device) for x in caches]
    tensors = (*caches, table.to(device), torch.tensor([0, *lens]).cumsum(0).int().to(device))
    scales = {name: x.to(device) for name, x in scales.items()}
    label = f"{request.op} {request.kv_dtype} to {request.dtype} {request.kv_layout}, seed {seed}, {form}"
    return KvPagesGatherCase(request, label, (*tensors, sum(lens), max(lens)), scales, form)


def _inside(x: Tensor) -> Tensor:
    """The same as a view of a tensor with a page as large between any two."""
    bits = x.view(torch.uint8)
    return torch.stack([bits, torch.full_like(bits, 0xFF)], 1)[:, 0].view(x.dtype)


make_case.variants = variants(inplace=False)  # type: ignore[attr-defined]
