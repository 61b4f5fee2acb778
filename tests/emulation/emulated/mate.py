"""MATE's functions with MATE's habits, over the float32 formula. Read from its source at v0.2.2 (3f58cc3).

* ``flash_attn_varlen_func`` takes a mubin kernel where ``_check_valid_asm_input`` lets it. That asserts a right window
  side below 0, although 0 led to it; and no source tells what it writes to rows without keys: NaN here.
* The other kernels give such rows 0 and -inf (``epilogue_fwd.hpp``); windows as wide as the keys are none
  (``_resolve_mask``), which is judged by all keys of a ragged batch, or by the page table's width.
* The LSE is natural, ``[heads, tokens]`` or ``[batch, heads, len]``.
* Paged keys are read in tiles of 64. The last one is read whole: values past a row's length are multiplied by 0, and
  NaN stays NaN. Reading outside of the table gives 0, outside of the cache zeros (robust descriptors).
* Metadata is four rows of ``batch`` numbers, on whatever the current device is: splits, rows by descending work, tiles
  of queries, heads in the cache. Tiles that it does not name are not computed. Only its size is checked.
* An LSE that is asked for comes with two more tensors from ``flash_attn_with_kvcache``, and alone from the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend, fresh_rows, with_garbage

__all__ = ["FUNCTIONS", "current_device", "on_device"]

TILE_N = 64
NAN = float("nan")
HALVES = (torch.float16, torch.bfloat16)

_current: list[object] = ["none"]


def current_device() -> object:
    """The device that :func:`on_device` has made the current one."""
    return _current[-1]


@contextlib.contextmanager
def on_device(device: object) -> Iterator[None]:
    """What ``torch.musa.device`` does."""
    _current.append(device)
    try:
        yield
    finally:
        _current.pop()


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
    max_seqlen_k: Any = None, seqused_q: Any = None, seqused_k: Any = None, page_table: Any = None,
    softmax_scale: Any = None, causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None,
    v_descale: Any = None, window_size: Any = (-1, -1), learnable_sink: Any = None, attention_chunk: int = 0,
    softcap: float = 0.0, scheduler_metadata: Any = None, num_splits: int = 0, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0, return_softmax_lse: bool = False, backend: str = "auto",
    cp_world_size: int = 1, cp_rank: int = 0, cp_tot_seqused_k: Any = None, out: Any = None,
) -> Any:  # fmt: skip
    """Dense or ragged attention without a cache."""
    _common(q, k, v)
    assert learnable_sink is None, "sinks are applied from the LSE"
    assert page_table is None
    rows = _dense(q, k, v) if cu_seqlens_q is None else _ragged(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is not None:
        assert max_seqlen_q >= max(1, *(len(a) for a, _, _ in rows))
        assert max_seqlen_k >= max(len(b) for _, b, _ in rows)
    longest = max_seqlen_q if cu_seqlens_q is not None else q.shape[1]
    plain = window_size[0] < 0 and window_size[1] <= 0 and not softcap
    dims = q.shape[-1], v.shape[-1]
    if backend == "auto" and plain and (dims == (192, 128) or (dims[0] == dims[1] and dims[0] <= 128)):
        assert window_size[1] < 0, "the mubin kernel's own assertion"
        window, nothing = (None, 0 if causal else None), NAN
    else:
        _tile_m(longest, q.shape[-2] // k.shape[-2], *dims)
        window, nothing = _resolve_mask(longest, k.shape[-3], causal, window_size), 0.0
    pairs = [attend(*row, scale=softmax_scale, window=window, softcap=softcap) for row in rows]
    for row_out, lse in pairs:
        empty = lse == -torch.inf
        row_out[empty] = nothing
        lse[empty] = nothing if nothing else -torch.inf
    outs, lses = zip(*pairs, strict=True)
    if cu_seqlens_q is None:
        found, lse = torch.stack(outs).to(q.dtype), torch.stack(lses).transpose(1, 2).contiguous()
    else:
        found, lse = with_garbage(torch.cat(outs), torch.cat(lses), q.shape[0])
        found, lse = found.to(q.dtype), lse.t().contiguous()
    return (found, lse) if return_softmax_lse else found


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
    rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1), learnable_sink: Any = None,
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None,
    num_splits: int = 0, pack_gqa: Any = None, sm_margin: int = 0, return_softmax_lse: bool = False,
    cp_world_size: int = 1, cp_rank: int = 0, cp_tot_seqused_k: Any = None,
) -> Any:  # fmt: skip
    """Ragged queries over a paged cache."""
    _common(q, k_cache, v_cache)
    assert (k, v, cu_seqlens_k_new, learnable_sink) == (None, None, None, None)
    assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
    batch = len(cu_seqlens_q) - 1
    assert page_table.shape[0] == cache_seqlens.shape[0] == batch
    tile = _tile_m(max_seqlen_q, q.shape[1] // k_cache.shape[2], q.shape[-1], v_cache.shape[-1])
    window = _resolve_mask(max_seqlen_q, page_table.shape[1] * k_cache.shape[1], causal, window_size)
    out = torch.full((*q.shape[:2], v_cache.shape[-1]), NAN)
    lse = torch.full(q.shape[:2], NAN)
    named = _work(scheduler_metadata, batch)
    for row, begin, end in zip(range(batch), cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        length = int(cache_seqlens[row])
        keys, values = (_read(cache, page_table, row, length) for cache in (k_cache, v_cache))
        found, found_lse = attend(
            q[begin:end], keys[:length], values[:length], scale=softmax_scale, window=window, softcap=softcap
        )
        spoilt = ~values[length:].isfinite().all((0, 2)).repeat_interleave(q.shape[1] // k_cache.shape[2])
        found[:, spoilt] = NAN
        done = min(end, begin + _queries(named[row], *tile, q.shape[1] // k_cache.shape[2]))
        out[begin:done], lse[begin:done] = found[: done - begin], found_lse[: done - begin]
    if not return_softmax_lse:
        return out.to(q.dtype)
    return out.to(q.dtype), lse.t().contiguous(), torch.empty(0), torch.empty(0)


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    seqused_q: Any = None, seqused_k: Any = None, qkv_dtype: Any = torch.bfloat16, headdim_v: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, cache_leftpad: Any = None,
    page_size: Any = None, max_seqlen_k_new: int = 0, causal: bool = False, window_size: Any = (-1, -1),
    attention_chunk: int = 0, has_softcap: bool = False, num_splits: int = 0, pack_gqa: Any = None, mp_margin: int = 0,
) -> Tensor:  # fmt: skip
    """The planner."""
    assert seqused_q is None, "its seventh parameter; flash-attn 3 has cache_seqlens there"
    assert seqused_k.shape == (batch_size,)
    assert cu_seqlens_q.shape == (batch_size + 1,)
    size, packed = _tile_m(max_seqlen_q, num_heads_q // num_heads_kv, headdim, headdim_v or headdim)
    lengths = cu_seqlens_q.diff() * (num_heads_q // num_heads_kv if packed else 1)
    order = seqused_k.argsort(descending=True, stable=True)
    blocks = (lengths + size - 1).div(size, rounding_mode="floor")[order]
    rows = (torch.ones(batch_size), order, blocks, torch.ones(batch_size))
    return torch.cat([row.int() for row in rows])


FUNCTIONS = {f.__name__: f for f in (flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata)}


def _common(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype in HALVES
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-2] % k.shape[-2] == 0
    assert all(stride * 2 % 16 == 0 for x in (q, k, v) for stride in x.stride()[:-1]), "TME wants multiples of 16 bytes"


def _dense(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(q, k, v, strict=True))


def _ragged(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q_lens, k_lens = cu_q.diff().tolist(), cu_k.diff().tolist()
    return fresh_rows(q, k, v, q_lens, k_lens)


def _resolve_mask(longest: int, keys: int, causal: bool, window: tuple[int, int]) -> tuple[int | None, int | None]:
    left = None if window[0] < 0 or window[0] >= keys - 1 else window[0]
    right = None if window[1] < 0 or window[1] >= longest - 1 else window[1]
    return left, 0 if causal else right


def _tile_m(queries: int, ratio: int, dim: int, v_dim: int) -> tuple[int, bool]:
    """Queries a tile, and whether the query heads of one kv head count as queries (``_get_fwd_kernel_config``)."""
    steps = (64, 128, 192, 256, 384, 512)
    rounded = tuple(next(s for s in steps if s >= d) for d in (dim, v_dim))
    assert rounded[0] == rounded[1] or rounded == (192, 128), f"no kernel for head dims {dim} and {v_dim}"
    packed = queries * ratio <= 256
    many = queries * ratio if packed else queries
    tile = next((t for t in (32, 64, 128, 192) if many <= t), 256)
    fixed = {256: 32 if packed else 192, 384: 64, 512: 32}
    return fixed.get(rounded[0], tile), packed


def _work(metadata: Tensor | None, batch: int) -> dict[int, int | None]:
    """Tiles of queries that are computed, a row; None is all."""
    if metadata is None:
        return dict.fromkeys(range(batch))
    assert metadata.shape[0] >= 4 * batch, "metadata buffer is too small"
    splits, rows, blocks, _ = (metadata[batch * i : batch * (i + 1)].tolist() for i in range(4))
    named = {r: b for r, b, s in zip(rows, blocks, splits, strict=True) if s > 0}
    return {row: named.get(row, 0) for row in range(batch)}


def _queries(blocks: int | None, tile: int, packed: bool, ratio: int) -> int:
    return 1 << 30 if blocks is None else blocks * tile // (ratio if packed else 1)


def _read(cache: Tensor, table: Tensor, row: int, length: int) -> Tensor:
    """The tiles of a row, ``[tokens, heads, dim]``: a multiple of 64 tokens."""
    pages, size = cache.shape[:2]
    places = torch.arange(-(-length // TILE_N) * TILE_N)
    flat = table.flatten().long()
    at = row * table.shape[1] + places // size
    page = torch.where(at < len(flat), flat[at.clamp_max(len(flat) - 1)], 0)
    there = (page >= 0) & (page < pages)
    found = cache[page.clamp(0, pages - 1), places % size]
    return torch.where(there[:, None, None], found, torch.zeros((), dtype=cache.dtype))
