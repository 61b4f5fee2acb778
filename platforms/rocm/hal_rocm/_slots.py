"""A cache of pages seen as one list of tokens: how aiter is kept from slots that hold nothing.

Its paged kernels read whole tiles and whole pages, and multiply what lies behind a row's last token by 0, which leaves
NaN as it is. So they get page size 1 and, for every token, where it lies; past a row's end that repeats a valid token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops.attention import Step

__all__ = ["gap_of", "respaced", "slots", "tokens"]


def slots(step: Step, into: Tensor) -> Tensor:
    """``page * page_size + place in the page`` of every token, row after row. Waits for nothing.

    ``into`` is int32, at least as long as all tokens are; what follows them repeats the last one.
    """
    size, total = step.page_size, sum(step.kv_lens_host)
    rows = torch.arange(step.batch, device=into.device)
    rows = torch.repeat_interleave(rows, step.kv_lens.long(), output_size=total)
    places = torch.arange(total, device=into.device) - step.cu_seqlens_k[rows]
    into[:total] = step.block_table[rows, places // size] * size + places % size
    into[total:] = into[total - 1] if total else 0
    return into


def respaced(found: Tensor, page_size: int, gap: int) -> Tensor:
    """The same in a cache whose pages begin every ``gap`` tokens."""
    return found + torch.div(found, page_size, rounding_mode="floor") * (gap - page_size)


def gap_of(k_cache: Tensor, v_cache: Tensor) -> int:
    """Tokens from the beginning of a page to that of the next: the page size, or twice that for interleaved caches.

    Raises:
        ValueError: that is no whole number, or K and V are laid out differently.
    """
    (page, token), (pages, size) = k_cache.stride()[:2], k_cache.shape[:2]
    if k_cache.stride() != v_cache.stride() or (pages > 1 and size > 1 and page % token):
        raise ValueError(
            f"the caches have strides {tuple(k_cache.stride())} and {tuple(v_cache.stride())}: aiter's paged kernels "
            "need K and V alike, with pages a whole number of tokens apart; use allocate_kv_cache(), or another kernel"
        )
    return page // token if pages > 1 and size > 1 else size


def tokens(cache: Tensor, gap: int) -> Tensor:
    """A cache ``[pages, page_size, heads, dim]`` as ``[slots, heads, dim]``, a view."""
    pages, size, heads, dim = cache.shape
    token = cache.stride(1 if size > 1 else 0)
    return cache.as_strided(((pages - 1) * gap + size, heads, dim), (token, *cache.stride()[2:]))
