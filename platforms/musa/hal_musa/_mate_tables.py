"""Page tables that name tokens: how MATE is kept from slots that hold nothing.

MATE reads keys and values in tiles of 64 tokens, and reads the last tile of a row whole: what lies past the row's
length gets weight 0 (``mask.hpp``), and 0 times NaN is NaN. Nothing clears it ("TODO: clear oob if needed" in
``paged_kv.hpp``; the bulk loads of pages of 64 do not either; Dao-AILab/flash-attention#2374 tells the same of
flash-attn 3 and 4). So a cache is given to it as pages of one token, which it takes as it takes any page size: the
table then says for each token where it lies, and past a row's length repeats the row's last one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops.attention import Step

__all__ = ["spacing", "spread", "token_table", "tokens"]

_TILE = 64


def token_table(step: Step) -> Tensor:
    """int32 ``[batch, width]``: ``page * page_size + offset`` of each token; ``width`` is a multiple of MATE's tile.

    Entries past a row's length are those of its last token; a row without tokens has 0 everywhere, and is not read.
    """
    table, size = step.block_table, step.page_size
    width = -(-max(1, min(step.max_kv_len, table.shape[1] * size)) // _TILE) * _TILE
    if not table.shape[1]:
        return table.new_zeros((step.batch, width))
    offsets = torch.arange(size, dtype=torch.int32, device=table.device)
    slots = ((table * size).unsqueeze(2) + offsets).flatten(1)[:, :width]
    lengths = step.kv_lens.unsqueeze(1)
    last = slots.gather(1, (lengths - 1).clamp_min(0).long())
    last = torch.where(lengths > 0, last, 0)
    slots = functional.pad(slots, (0, width - slots.shape[1]))
    return torch.where(torch.arange(width, dtype=torch.int32, device=table.device) < lengths, slots, last)


def spread(table: Tensor, page_size: int, gap: int) -> Tensor:
    """The same slots in caches whose pages begin every ``gap`` tokens."""
    return table + torch.div(table, page_size, rounding_mode="floor") * (gap - page_size)


def spacing(k_cache: Tensor, v_cache: Tensor) -> int:
    """How many tokens lie between the beginnings of two pages: the page size, or twice that for interleaved caches.

    Raises:
        ValueError: it is no whole number, or K's and V's differ.
    """
    gaps = {_gap(cache) for cache in (k_cache, v_cache)}
    if len(gaps) != 1 or None in gaps:
        raise ValueError(
            "MATE needs K and V caches whose pages lie a whole number of tokens apart, the same for both: their "
            f"strides are {k_cache.stride()} and {v_cache.stride()}; allocate them with allocate_kv_cache()"
        )
    return int(gaps.pop() or 0)


def _gap(cache: Tensor) -> int | None:
    pages, size = cache.shape[:2]
    page, token = cache.stride()[:2]
    if pages == 1:
        return size
    if size == 1:
        return 1
    return None if token == 0 or page % token else page // token


def tokens(cache: Tensor, gap: int) -> Tensor:
    """A cache ``[pages, page_size, heads, dim]`` seen as ``[slots, 1, heads, dim]``, without a copy."""
    pages, size, heads, dim = cache.shape
    token = cache.stride(0 if size == 1 else 1)
    return cache.as_strided(((pages - 1) * gap + size, 1, heads, dim), (token, token, *cache.stride()[2:]))
