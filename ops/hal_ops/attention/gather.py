"""Which rows of a step are attended to together, and the keys of those rows picked out of the paged cache.

Rows that have equally many queries are grouped when their keys are nearly as many. Keys are aligned to the end, so
that causality, windows and distances are the same for all rows of a group; a shorter row's missing first keys are
hidden. Only slots that hold tokens are read: a hidden key repeats the row's last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8
from hal_ops._record import record
from hal_ops.attention import masks
from hal_ops.attention.contract import Step
from hal_ops.attention.request import AttentionRequest
from hal_ops.kv_layout import VECTORS, by_token

__all__ = ["Gather", "Group", "plan_groups"]

_KEYS_AT_ONCE = 8 << 20
"""Bytes of keys gathered at once. Above 32 MiB glibc maps and clears fresh pages at each call, ten times as slow."""
_SPARE_KEYS = 32
_SPARE_SHARE = 8


@record(frozen=True)
class Group:
    """Rows attended to in one call.

    Fields:
        rows, q_len: how many rows, and queries of each. tokens: where they are in q.
        pages, offsets: int64 ``[rows, keys]``, the slot of each key.
        hidden: see :func:`hal_ops.attention._sdpa.attend`.
        index: flat slot numbers by strides of the cache, made on first use.
    """

    rows: int
    q_len: int
    tokens: slice | Tensor
    pages: Tensor
    offsets: Tensor
    hidden: Tensor | None
    index: dict[tuple[int, ...], Tensor] = dataclasses.field(default_factory=dict)

    def queries(self, q: Tensor) -> Tensor:
        """``[rows, q_len, heads, dim]`` out of q ``[tokens, heads, dim]``."""
        return q[self.tokens].view(self.rows, self.q_len, *q.shape[1:])


class _Row(NamedTuple):
    number: int
    start: int
    q_len: int
    kv_len: int
    keys: int
    empty: int


def plan_groups(step: Step, request: AttentionRequest, compute: torch.dtype) -> list[Group]:
    """The groups of a step. Uses host lengths only."""
    width = max(request.head_dim, request.v_head_dim) * request.num_kv_heads * compute.itemsize
    limit = max(1, _KEYS_AT_ONCE // width)
    packs: list[list[_Row]] = []
    for row in sorted(_rows(step, request), key=lambda r: (r.q_len, r.empty, -r.keys)):
        if packs and _fits(packs[-1], row, limit):
            packs[-1].append(row)
        else:
            packs.append([row])
    dtype = torch.promote_types(compute, torch.float32)
    return [_group(sorted(pack, key=lambda r: r.number), step, dtype) for pack in packs]


def _rows(step: Step, request: AttentionRequest) -> Iterable[_Row]:
    limits = masks.sides(request.causal, request.window)
    start = 0
    for number, (q_len, kv_len) in enumerate(zip(step.q_lens, step.kv_lens_host, strict=True)):
        if q_len:
            low, _ = masks.key_range(0, q_len - 1, q_len, kv_len, limits)
            yield _Row(number, start, q_len, kv_len, kv_len - low, masks.empty_rows(q_len, kv_len, limits[1]))
        start += q_len


def _fits(pack: list[_Row], row: _Row, limit: int) -> bool:
    """Whether ``row``, no longer than those before it, is attended to with them."""
    most = pack[0].keys
    if (row.q_len, row.empty) != (pack[0].q_len, pack[0].empty) or (len(pack) + 1) * most > limit:
        return False
    spare = max(_SPARE_KEYS, most // _SPARE_SHARE) if row.empty == 0 and row.keys else 0
    return most - row.keys <= spare


def _group(pack: list[_Row], step: Step, dtype: torch.dtype) -> Group:
    device = step.block_table.device
    most, q_len = max(row.keys for row in pack), pack[0].q_len
    numbers = torch.tensor([(row.number, row.kv_len, row.keys) for row in pack], device=device)
    rows, ends, keys = numbers.unbind(1)
    positions = ends.unsqueeze(1) - most + torch.arange(most, device=device)
    absent = torch.arange(most, device=device) < (most - keys).unsqueeze(1)
    positions = torch.where(absent, (ends - 1).unsqueeze(1), positions)
    pages = step.block_table[rows].long().gather(1, positions // step.page_size)
    uneven = any(row.keys != most for row in pack)
    hidden = torch.zeros(absent.shape, dtype=dtype, device=device).masked_fill_(absent, -torch.inf) if uneven else None
    return Group(
        rows=len(pack),
        q_len=q_len,
        tokens=_tokens(pack, device),
        pages=pages,
        offsets=positions % step.page_size,
        hidden=None if hidden is None else hidden[:, None, None],
    )


def _tokens(pack: list[_Row], device: torch.device) -> slice | Tensor:
    first, last = pack[0], pack[-1]
    if last.start - first.start == (len(pack) - 1) * first.q_len:
        return slice(first.start, last.start + last.q_len)
    starts = torch.tensor([row.start for row in pack], device=device)
    return (starts.unsqueeze(1) + torch.arange(first.q_len, device=device)).flatten()


class Gather:
    """Picks a group's keys out of a cache of any layout: ``[rows, keys, num_kv_heads, dim]`` in ``compute``."""

    def __init__(self, request: AttentionRequest, compute: torch.dtype) -> None:
        self.layout = request.kv_layout
        self.fp8 = is_fp8(request.kv_dtype)
        self.compute = compute

    def __call__(self, cache: Tensor, group: Group) -> Tensor:
        # torch 2.6.0 cannot index the 8-bit float formats.
        found = self._pick(cache.view(torch.uint8) if self.fp8 else cache, group)
        return found.view(cache.dtype).to(self.compute)

    def _pick(self, cache: Tensor, group: Group) -> Tensor:
        cache = by_token(cache, self.layout)
        dim = cache.shape[3]
        scattered = self.layout == VECTORS or cache.stride(3) != 1
        if not cache.numel() or scattered or any(stride % dim for stride in cache.stride()[:3]):
            return cache[group.pages, group.offsets].flatten(3)
        last = sum((n - 1) * stride for n, stride in zip(cache.shape[:3], cache.stride(), strict=False))
        flat = cache.as_strided((last // dim + 1, dim), (dim, 1))
        size = (group.rows, cache.shape[2], group.pages.shape[1], dim)
        return flat.index_select(0, self._index(cache, group)).view(size).transpose(1, 2)

    def _index(self, cache: Tensor, group: Group) -> Tensor:
        """Numbers of the vectors in memory, heads before keys: the products that follow run twice as fast so."""
        key = cache.stride()
        if key not in group.index:
            page, offset, head = (stride // cache.shape[3] for stride in key[:3])
            slots = group.pages * page + group.offsets * offset
            heads = torch.arange(cache.shape[2], device=slots.device) * head
            group.index[key] = (slots.unsqueeze(1) + heads.unsqueeze(1)).flatten()
        return group.index[key]
