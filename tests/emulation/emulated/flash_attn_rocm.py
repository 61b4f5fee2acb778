"""flash-attn's habits on ROCm (2.8.3, ``csrc/flash_attn_ck`` and ``flash_attn/flash_attn_triton_amd``).

* CK: as :mod:`emulated.flash_attn_2`, but pages of a multiple of 128, ``softcap`` ignored, and an LSE of +inf only
  where the whole call has no keys; -inf in other rows without keys.
* Triton: windows, caps and block tables ignored; the LSE of a row without keys is 0, or its neighbour's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend, attend_rows, paged_rows, with_garbage
from emulated.flash_attn_2 import require

__all__ = ["CK", "TRITON"]

Row = tuple[Tensor, Tensor, Tensor]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    require(q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "no such head dim")
    require(q.shape[-2] % k.shape[-2] == 0, "heads of key must divide heads of query")
    require(q.shape[0] > 0, "batch size must be positive")


def _rows(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[Row]:
    require(cu_q.dtype == cu_k.dtype == torch.int32, "cu_seqlens must have dtype int32")
    q_lens, k_lens = cu_q.diff().tolist(), cu_k.diff().tolist()
    require(max(q_lens) <= max_q and max(k_lens) <= max_k, "rows past the bounds are left uncomputed")
    return list(zip(q.split(q_lens), k.split(k_lens), v.split(k_lens), strict=True))


def _ck(rows: list[Row], q: Tensor, v: Tensor, scale: float, causal: bool, window: Any, slopes: Any) -> Any:
    left, right = (None if side < 0 else side for side in window)
    settings = {"scale": scale, "causal": causal, "window": (left, right), "alibi": slopes}
    out, lse = attend_rows(rows, q, v.shape[-1], **settings)
    lse = lse.detach() if any(len(k) for _, k, _ in rows) else torch.full_like(lse, math.inf)
    return out.to(q.dtype), lse


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size: Any,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool,
) -> Any:  # fmt: skip
    """Dense, CK."""
    _check(q, k, v)
    out, lse = _ck(list(zip(q, k, v, strict=True)), q, v, softmax_scale, causal, window_size, alibi_slopes)
    out = out.view(*q.shape[:-1], v.shape[-1])
    return (out, lse.view(q.shape[:-1]).transpose(1, 2), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size: Any, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool, block_table: Tensor | None,
) -> Any:  # fmt: skip
    """Ragged, CK, over fresh keys or over pages."""
    _check(q, k, v)
    if block_table is None:
        rows = _rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    else:
        used = q[: int(cu_seqlens_q[-1])]
        rows = _paged(used.split(cu_seqlens_q.diff().tolist()), k, v, block_table, cu_seqlens_k.diff())
    out, lse = with_garbage(*_ck(rows, q, v, softmax_scale, causal, window_size, alibi_slopes), q.shape[0])
    return (out, lse.t(), None) if return_attn_probs else out


def _paged(queries: Any, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> list[Row]:
    require(k.shape[1] % 128 == 0, "Paged KV cache block size must be divisible by 128")
    require(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32, its last dim contiguous")
    require(len(table) == len(lengths), "block_table must have a row a sequence")
    return paged_rows(list(queries), k, v, table, lengths.tolist())


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None, v: None, rotary_cos: None, rotary_sin: None,
    cache_seqlens: Tensor, cache_batch_idx: None, cache_leftpad: None, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: Any, softcap: float, rotary_interleaved: bool, alibi_slopes: Tensor | None,
    num_splits: int, return_softmax_lse: bool,
) -> Any:  # fmt: skip
    """Rows of equally many queries over pages, CK."""
    _check(q, k_cache, v_cache)
    require(cache_seqlens.dtype == torch.int32 and len(cache_seqlens) == len(q), "seqlens_k must be int32 [batch]")
    rows = _paged(q, k_cache, v_cache, block_table, cache_seqlens)
    out, lse = _ck(rows, q, v_cache, softmax_scale, causal, window_size, alibi_slopes)
    out = out.view(*q.shape[:-1], v_cache.shape[-1])
    return (out, lse.view(q.shape[:-1]).transpose(1, 2)) if return_softmax_lse else out


def _triton(rows: list[Row], scale: float, causal: bool) -> list[tuple[Tensor, Tensor]]:
    found = [attend(*row, scale=scale, causal=causal) for row in rows]
    return [(out, lse.masked_fill(lse == -math.inf, 0.0)) for out, lse in found]


def triton_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, *ignored: Any
) -> Tensor:
    """Dense, Triton."""
    _check(q, k, v)
    found = _triton(list(zip(q, k, v, strict=True)), softmax_scale, causal)
    return torch.stack([out for out, _ in found]).to(q.dtype)


def triton_flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, *ignored: Any,
) -> Tensor:  # fmt: skip
    """Ragged, Triton."""
    _check(q, k, v)
    rows = _rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return torch.cat([out for out, _ in _triton(rows, softmax_scale, causal)]).to(q.dtype)


CK = {f.__name__: f for f in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)}
TRITON = {f.__name__.removeprefix("triton_"): f for f in (triton_flash_attn_func, triton_flash_attn_varlen_func)}
