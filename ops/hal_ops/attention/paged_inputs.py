"""Paged inputs for tests: steps, block tables and caches, with poison wherever an implementation must not look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.attention.contract import Step
from hal_ops.attention.request import AttentionRequest
from hal_ops.kv_cache.reference import quantize
from hal_ops.kv_layout import arranged, vector_of

__all__ = ["block_tables", "build_cache", "make_step", "scales", "slots_of"]

SPARE_PAGES = 3
SPARE_COLUMNS = 2
GARBAGE_PAGES = (-1, 2**31 - 1, 2_147_480_000)


def make_step(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_table: Tensor,
    page_size: int,
    device: torch.device | str = "cpu",
) -> Step:
    """The neutral form of a step, from host lengths in tokens and an int32 block table."""

    def cumulative(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    news = [slots_of(row, page_size, kv - q, kv) for row, q, kv in zip(block_table, q_lens, kv_lens, strict=True)]
    return Step(
        batch=len(q_lens),
        num_tokens=sum(q_lens),
        max_q_len=max(q_lens, default=0),
        max_kv_len=max(kv_lens, default=0),
        q_lens=tuple(q_lens),
        kv_lens_host=tuple(kv_lens),
        cu_seqlens_q=cumulative(q_lens),
        cu_seqlens_k=cumulative(kv_lens),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_table=block_table.to(device, torch.int32),
        slot_mapping=torch.cat([torch.zeros(0, dtype=torch.int64), *news]).to(device),
        page_size=page_size,
    )


def slots_of(row: Tensor, page_size: int, first: int, end: int) -> Tensor:
    """Slots of a row's positions ``first`` to ``end``; positions before the row's first token have slot -1."""
    positions = torch.arange(first, end)
    kept = positions.clamp_min(0)
    slots = row.cpu().long()[kept // page_size] * page_size + kept % page_size if row.numel() else kept
    return torch.where(positions >= 0, slots, -1)


def block_tables(lengths: Sequence[tuple[int, int]], page_size: int, draw: torch.Generator) -> tuple[Tensor, int]:
    """A block table over permuted pages, and the number of pages.

    Entries past a row's last page are ids that no cache has. Two rows whose first page holds no token of this step
    share it, as rows with a common prefix do.
    """
    counts = [-(-kv // page_size) for _, kv in lengths]
    num_pages = sum(counts) + SPARE_PAGES
    order = torch.randperm(num_pages, generator=draw).int()
    width = max(counts, default=0) + SPARE_COLUMNS
    garbage = torch.tensor([*GARBAGE_PAGES, num_pages], dtype=torch.int32)
    table = garbage.repeat(-(-len(counts) * width // 4) + 1)[: len(counts) * width].view(len(counts), width).clone()
    taken = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[taken : taken + count]
        taken += count
    old = [row for row, (q, kv) in enumerate(lengths) if kv - q >= page_size]
    if len(old) > 1:
        table[old[-1], 0] = table[old[0], 0]
    return table, num_pages


def scales(request: AttentionRequest, first: float) -> Tensor | None:
    """Scales of 0.5 and 2 in turn, ``first`` first, in the form that the request asks for; None without FP8."""
    if not is_fp8(request.kv_dtype):
        return None
    heads = request.num_kv_heads if request.kv_scale == "head" else 1
    return torch.tensor([first, 1 / first] * heads)[:heads]


def build_cache(
    slots: Tensor,
    values: Tensor,
    num_pages: int,
    request: AttentionRequest,
    scale: Tensor | None,
    *,
    keys: bool = True,
) -> Tensor:
    """A cache in the request's format and layout whose ``slots`` hold ``values`` ``[tokens, heads, dim]``.

    ``keys``: it is that of K, which one layout keeps otherwise than V.

    All other slots hold NaN; every other one of them infinity, where the format has it and the cache is not FP8.
    """
    size = int(request.page_size)
    cache = torch.full((num_pages * size, *values.shape[1:]), torch.nan, dtype=torch.float64)
    if not is_fp8(request.kv_dtype):
        cache[::2] = torch.inf
    cache[slots] = values.double()
    dtype = torch_dtype(request.kv_dtype)
    stored = quantize(cache, scale, request.kv_dtype) if is_fp8(request.kv_dtype) else cache.to(dtype)
    pages = stored.view(num_pages, size, *values.shape[1:])
    return arranged(pages, request.kv_layout, vector_of(request.kv_dtype) if keys else 1)
