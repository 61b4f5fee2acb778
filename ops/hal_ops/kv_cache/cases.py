"""Inputs for the cache write, and what the caches must hold afterwards, bit by bit where nothing is rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.case import Case
from hal_ops.compare import Comparison
from hal_ops.kv_cache.op import KvCacheWriteRequest
from hal_ops.kv_cache.reference import write
from hal_ops.kv_layout import by_token, page_shapes

__all__ = ["KvCacheWriteCase", "bits_of", "make_case"]

NUM_PAGES = 7
SKIPPED = -1


@dataclasses.dataclass(frozen=True)
class KvCacheWriteCase(Case):
    """Tokens for slots in disorder, some skipped, over caches that hold NaN. Each call writes fresh copies."""

    request: KvCacheWriteRequest
    label: str
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    scales: dict[str, Tensor]
    interleaved: bool

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """The caches after the write."""
        k_cache, v_cache = self.fresh()
        implementation(self.k, self.v, k_cache, v_cache, self.slot_mapping, **self.scales)
        return {"k_cache": k_cache, "v_cache": v_cache}

    def expected(self) -> dict[str, Tensor]:
        """The caches after the reference's write, in the cache's format."""
        return self.call(write(self.request, self.k.device))

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Written slots may differ from the reference by one step of an FP8 format; all others not by a bit."""
        found, right = self.call(implementation), self.expected()
        return tuple(self.judge(name, found[name], right[name]) for name in found)

    def fresh(self) -> tuple[Tensor, Tensor]:
        """Caches to write to: of the same memory layout, with the same bits."""
        if not self.interleaved:
            return self.k_cache.clone(), self.v_cache.clone()
        k_bits, v_bits = (bits_of(cache) for cache in (self.k_cache, self.v_cache))
        halves = torch.stack([k_bits.flatten(1), v_bits.flatten(1)], 1).unbind(1)
        k_half, v_half = (half.view(bits.shape) for half, bits in zip(halves, (k_bits, v_bits), strict=True))
        return k_half.view(self.k_cache.dtype), v_half.view(self.v_cache.dtype)

    def written(self) -> Tensor:
        """Whether a slot has a token, bool ``[slots]``, on the host."""
        written = torch.zeros(NUM_PAGES * self.request.page_size, dtype=torch.bool)
        written[self.slot_mapping[self.slot_mapping >= 0].cpu()] = True
        return written

    def slots_of(self, cache: Tensor) -> Tensor:
        """A cache, or something of its shape, as ``[slots, num_kv_heads, dim]`` on the host."""
        return by_token(cache.cpu(), self.request.kv_layout).flatten(0, 1).flatten(2)

    def judge(self, name: str, found: Tensor, right: Tensor, most_steps: float | None = None) -> Comparison:
        """Written slots within ``most_steps`` of the format (default: one of an FP8 format), all others equal."""
        steps = self.slots_of((_order(found.cpu()) - _order(right.cpu())).abs())
        written, failures = self.written(), []
        if most_steps is None:
            most_steps = 1 if is_fp8(self.request.kv_dtype) else 0
        wrong = steps[written] > most_steps
        if bool(wrong.any()):
            failures.append(f"{wrong.double().mean().item():.1%} of the written elements differ from the reference")
        touched = steps[~written].ne(0).flatten(1).any(1)
        if bool(touched.any()):
            slots = (~written).nonzero().flatten()[touched].tolist()
            failures.append(f"slots {slots[:8]} were written, and no token has them")
        most = float(steps[written].max()) if bool(written.any()) else 0.0
        return Comparison(f"{self.label}: {name}", tuple(failures), most)


def make_case(
    request: KvCacheWriteRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    tokens: int = 23,
    interleaved: bool = False,
) -> KvCacheWriteCase:
    """Random tokens, values too large for FP8 among them, on random slots; every fifth token is skipped.

    Raises:
        ValueError: more tokens than the cache of seven pages has slots, or ``interleaved`` with unequal head dims.
    """
    slots = NUM_PAGES * request.page_size
    tokens = min(tokens, slots)
    if interleaved and request.head_dim != request.v_head_dim:
        raise ValueError("interleaved caches need v_head_dim == head_dim")
    draw = torch.Generator().manual_seed(seed)
    mapping = torch.randperm(slots, generator=draw)[:tokens]
    mapping[::5] = SKIPPED
    heads, dtype = request.num_kv_heads, torch_dtype(request.dtype)
    k, v = (torch.randn(tokens, heads, dim, generator=draw) for dim in (request.head_dim, request.v_head_dim))
    for x in (k, v):
        if x.numel():
            x.view(-1)[:: max(1, x.numel() // 7)] *= 1e4
    scales = {}
    if is_fp8(request.kv_dtype):
        count = heads if request.kv_scale == "head" else 1
        for name, first in (("k_scale", 0.5), ("v_scale", 2.0)):
            scales[name] = torch.tensor([first, 1 / first, 0.3] * count)[:count].to(device)
    caches = [cache.to(device) for cache in _empty_caches(request)]
    label = f"kv_cache_write {request.kv_dtype} {request.kv_layout}, seed {seed}, {tokens} tokens"
    k, v = (x.to(dtype).to(device) for x in (k, v))
    return KvCacheWriteCase(request, label, k, v, caches[0], caches[1], mapping.to(device), scales, interleaved)


def _empty_caches(request: KvCacheWriteRequest) -> list[Tensor]:
    names = ("kv_layout", "page_size", "num_kv_heads", "head_dim", "v_head_dim", "kv_dtype")
    shapes = page_shapes(*(getattr(request, name) for name in names))
    return [torch.full((NUM_PAGES, *shape), torch.nan).to(torch_dtype(request.kv_dtype)) for shape in shapes]


def bits_of(x: Tensor) -> Tensor:
    """The memory of a tensor as integers of its elements' width."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(widths[x.itemsize])


def _order(x: Tensor) -> Tensor:
    """Integers in the order of the numbers that the bits stand for, one apart for neighbours; int64."""
    width = 8 * x.itemsize
    bits = bits_of(x).long() & ((1 << width) - 1) if width < 64 else bits_of(x)
    top = 1 << (width - 1) if width < 64 else -(1 << 63)
    magnitude = bits & ~top
    return torch.where((bits & top) != 0, -magnitude, magnitude)
