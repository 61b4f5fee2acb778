"""The habits of aiter's HIP decode over keys in vectors (github.com/ROCm/aiter, v0.1.7.post5 to v0.1.20.post1).

* ``paged_attention_rocm`` (``csrc/cpp_itfs/pa/pa.py``, ``pa.cuh``) knows memory by K's page and head strides alone, V's
  too; q by its first stride; the table, lengths and scratch as contiguous, the scratch 256 keys a partition.
* lanes take 16 tokens of V; dims go in steps of 64; with more than 16 query heads a kv head, heads are mistaken.
* V's last page is read whole, and what lies behind a row's end is multiplied by 0; of K it is masked.
* ``mtp`` queries a row see each other causally, aligned to the end. A row without keys looks at -1 in the scratch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import emulated.library
import hal
from emulated.aiter import HALVES, of_version, require
from emulated.attend import attend
from emulated.signatures import versions

__all__ = ["emulations", "installed"]

PARTITION = 256


def installed(
    version: str = "", library: str = "amd-aiter"
) -> contextlib.AbstractContextManager[emulated.library.Installed]:
    """A version of aiter, the newest one by default, with its HIP decode."""
    version = version or versions(library)[-1]
    functions = emulations(version, library)
    return emulated.library.installed(library, version, functions, adapters=["hal_rocm._aiter_pa"])


def emulations(version: str, library: str = "amd-aiter") -> dict[str, Callable[..., Any]]:
    """Of a version's HIP decode."""
    return of_version(library, version, {"paged_attention_rocm": _decode})


def _decode(
    *, out: Tensor, exp_sums: Tensor, max_logits: Tensor, tmp_out: Tensor, query: Tensor, key_cache: Tensor,
    value_cache: Tensor, num_kv_heads: int, scale: float, block_tables: Tensor, context_lens: Tensor, block_size: int,
    max_context_len: int, alibi_slopes: Tensor | None, kv_cache_dtype: str, k_scale: Tensor, v_scale: Tensor,
    version: hal.Version, fp8_out_scale: Tensor | None = None, partition_size: int = 256, mtp: int = 1,
) -> Tensor:  # fmt: skip
    rows, heads, dim = block_tables.shape[0], query.shape[1], query.shape[2]
    _check_formats(query, key_cache, value_cache, out, kv_cache_dtype)
    require(fp8_out_scale is None and partition_size == PARTITION, "not used here")
    require(all(isinstance(x, Tensor) for x in (k_scale, v_scale)), "scales are read where they are given or not")
    require(dim % 64 == 0 and block_size % 16 == 0, "16 tokens a lane, 64 elements of V a step")
    require(heads // num_kv_heads <= 16, "heads of the second kv head on are mistaken")
    require(len(query) >= rows * mtp and len(out) >= rows * mtp, "reads and writes past the queries")
    _check_tables(block_tables, context_lens, block_size, max_context_len)
    _check_scratch(exp_sums, max_logits, tmp_out, out, (rows * mtp, heads, -(-max_context_len // PARTITION)))
    queries = query.as_strided((rows * mtp, heads, dim), (query.stride(0), dim, 1))
    k, v = _memory(key_cache, value_cache, num_kv_heads, dim, block_size)
    for row, length in enumerate(context_lens.tolist()):
        require(length <= max_context_len, "more keys than partitions")
        own = slice(row * mtp, (row + 1) * mtp)
        if not length:
            require(row > 0 or min(exp_sums.storage_offset(), tmp_out.storage_offset()) > 0, "it reads before these")
            out[own] = math.nan
            continue
        pages = block_tables[row, : -(-length // block_size)].long()
        require(bool(((pages >= 0) & (pages < k.shape[0])).all()), "a page outside of the cache")
        keys, values = (x[pages].flatten(0, 1) for x in (k, v))
        found, _ = attend(queries[own], keys[:length], values[:length], scale=scale, causal=mtp > 1, alibi=alibi_slopes)
        out[own] = (found + _zero_times(values[length:], heads)).to(out.dtype)
    return out


def _check_formats(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, kv_cache_dtype: str) -> None:
    alike = q.dtype == k_cache.dtype == v_cache.dtype == out.dtype
    require(q.dtype in HALVES and alike and kv_cache_dtype == "auto", "Unsupported data type")
    require((k_cache.dim(), v_cache.dim()) == (5, 4), "a value cache of five dims is another layout")
    require(out.is_contiguous(), "written as if it were contiguous")


def _check_tables(tables: Tensor, lengths: Tensor, size: int, longest: int) -> None:
    require(tables.is_contiguous() and lengths.is_contiguous(), "read as if they were contiguous")
    require(tables.dtype == lengths.dtype == torch.int32, "int32")
    require(tables.dim() == 2 and tables.shape[1] >= -(-longest // size), "block_tables.size(1) is too small")
    require(len(lengths) == len(tables), "context_lens.size(0) must match block_tables.size(0)")
    require(longest > 0, "a grid of nothing")


def _check_scratch(sums: Tensor, tops: Tensor, parts: Tensor, out: Tensor, shape: tuple[int, int, int]) -> None:
    require(sums.dtype == tops.dtype == torch.float32 and parts.dtype == out.dtype, "the scratch has other formats")
    for x in (sums, tops, parts):
        require(x.is_contiguous() and x.shape[1:3] == shape[1:] and len(x) >= shape[0], "the scratch has other strides")
    require(parts.shape[3] == out.shape[2], "the scratch has other strides")
    for x in (sums, tops, parts):
        x.fill_(math.nan)


def _memory(k_cache: Tensor, v_cache: Tensor, heads: int, dim: int, size: int) -> tuple[Tensor, Tensor]:
    """Both as ``[pages, page_size, heads, dim]``: what lies at the places that the kernel computes."""
    page, head = k_cache.stride()[:2]
    x = 16 // k_cache.itemsize
    pages = len(k_cache)
    k = k_cache.as_strided((pages, size, heads, dim // x, x), (page, x, head, size * x, 1))
    return k.flatten(3), v_cache.as_strided((pages, size, heads, dim), (page, 1, head, size))


def _zero_times(behind: Tensor, heads: int) -> Tensor:
    """``[heads, dim]``: 0, but for what is not finite."""
    return (behind.float() * 0.0).sum(0).repeat_interleave(heads // behind.shape[1], 0)
