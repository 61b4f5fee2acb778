"""The habits of aiter's ``unified_attention``, over the formula (github.com/ROCm/aiter, v0.1.12 to v0.1.20.post1).

* Causal only, and of the window the left side; no LSE. Rows are found by ``cu_seqlens_q``, but with a bound of one
  query row i is token i (``ALL_DECODE``).
* Tiles have at most 64 keys. Where a tile is a whole page, which happens up to 64 tokens a page, and before v0.1.12
  always, all of it is loaded: what lies behind the last token is multiplied by 0.
* FP8 caches are read as the arch's own e4m3, with one scale each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hal
from emulated.aiter import of_version, require
from emulated.attend import attend

__all__ = ["LARGEST_TILE", "emulations"]

LARGEST_TILE = 64
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def emulations(version: str, fp8: torch.dtype | None = None) -> dict[str, Callable[..., Any]]:
    """``fp8`` is the flavour that the device multiplies."""

    @functools.wraps(_unified)
    def unified_attention(**told: Any) -> None:
        _unified(**told, fp8=fp8)

    return of_version("amd-aiter", version, {"unified_attention": unified_attention})


def _unified(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, seqused_k: Tensor,
    max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: Sequence[int], block_table: Tensor,
    softcap: float, q_descale: None, k_descale: Tensor | None, v_descale: Tensor | None, version: hal.Version,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, fp8: torch.dtype | None = None,
) -> None:  # fmt: skip
    require(causal, "Only causal attention is supported")
    require(q_descale is None, "queries are not FP8 here")
    require(sinks is None or sinks.shape[0] == q.shape[1], "Sinks must be num_query_heads size")
    require(block_table.stride(-1) == 1 and block_table.dtype == torch.int32, "pages are found by the rows' stride")
    require(len(block_table) == len(seqused_k) == len(cu_seqlens_q) - 1, "one row a sequence")
    keys, values = _read(k, k_descale, q, fp8), _read(v, v_descale, q, fp8)
    begins = list(range(len(seqused_k) + 1)) if max_seqlen_q == 1 else cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        begin, end = begins[row], begins[row + 1]
        require(end - begin <= max_seqlen_q and length <= max_seqlen_k, "the bounds are too small")
        pages = block_table[row, : -(-length // k.shape[1])].long()
        own = [cache[pages].flatten(0, 1) for cache in (keys, values)]
        found, _ = attend(
            q[begin:end], own[0][:length], own[1][:length], scale=softmax_scale, softcap=softcap, sinks=sinks,
            window=(None if window_size[0] < 0 else window_size[0], 0), alibi=alibi_slopes,
        )  # fmt: skip
        whole_pages = k.shape[1] <= LARGEST_TILE or version.satisfies("<0.1.12") is True
        if whole_pages and not own[1][length:].isfinite().all():
            found = torch.full_like(found, torch.nan)
        out[begin:end] = found.to(out.dtype)


def _read(cache: Tensor, scale: Tensor | None, q: Tensor, fp8: torch.dtype | None) -> Tensor:
    """A cache as float32."""
    require(cache.stride(-1) == 1, "the last dimension must be contiguous")
    if cache.dtype not in FP8:
        require(cache.dtype == q.dtype, "a cache is in the format of the queries, or FP8")
        return cache.float()
    require(scale is not None and scale.numel() == 1 and scale.dtype == torch.float32, "one float32 scale")
    assert scale is not None
    assert fp8 is not None
    return cache.view(fp8).float() * scale
