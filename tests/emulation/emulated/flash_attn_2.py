"""flash-attention 2's habits over the formula (flash-attn 2.8.3, ``csrc/flash_attn/flash_api.cpp``).

* LSE natural, ``[batch, heads, len]`` or ``[heads, tokens]``; +inf for a row without keys, whose output is 0.
* windows ``(left, right)`` with -1 for unlimited; causality aligned to the last key; ALiBi by slope.
* pages of a multiple of 256; a bound of one query makes it reshape q by the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend_rows, fresh_rows, paged_rows, with_garbage

__all__ = ["FUNCTIONS", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "require"]


def require(holds: bool, text: str) -> None:
    """The library's ``TORCH_CHECK``."""
    if not holds:
        raise RuntimeError(text)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    require(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head_size must be a multiple of 8, at most 256")
    require(q.shape[-1] == v.shape[-1], "value must have the head size of query")
    require(q.shape[-2] % k.shape[-2] == 0, "heads of key must divide heads of query")


def _settings(scale: float, causal: bool, window: tuple[int, int], softcap: float, slopes: Tensor | None) -> Any:
    left, right = (None if side < 0 else side for side in window)
    require(slopes is None or slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
    return {"scale": scale, "causal": causal, "window": (left, right), "softcap": softcap, "alibi": slopes}


def _finish(out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return out.to(q.dtype), lse.detach().masked_fill(lse == -torch.inf, torch.inf)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size: Any,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool,
) -> Any:  # fmt: skip
    """Dense."""
    _check(q, k, v)
    require(q.shape[0] > 0, "batch size must be positive")
    settings = _settings(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = _finish(*attend_rows(list(zip(q, k, v, strict=True)), q, v.shape[-1], **settings), q)
    out = out.view(*q.shape[:-1], v.shape[-1])
    return (out, lse.view(q.shape[:-1]).transpose(1, 2), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size: Any, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, return_attn_probs: bool, block_table: Tensor | None,
) -> Any:  # fmt: skip
    """Ragged, over fresh keys or over pages."""
    _check(q, k, v)
    _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size, alibi_slopes)
    q_lens, kv_lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    if block_table is None:
        rows = fresh_rows(q, k, v, q_lens, kv_lens)
    else:
        _check_pages(k, block_table, len(q_lens))
        rows = paged_rows(q[: sum(q_lens)].split(q_lens), k, v, block_table, kv_lens)
    settings = _settings(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = with_garbage(*_finish(*attend_rows(rows, q, v.shape[-1], **settings), q), q.shape[0])
    return (out, lse.t(), None) if return_attn_probs else out


def _check_lengths(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, window: Any, slopes: Tensor | None
) -> None:
    for cu in (cu_q, cu_k):
        require(cu.dtype == torch.int32 and cu.is_contiguous(), "cu_seqlens must have dtype int32 and be contiguous")
    rows = cu_q.shape[0] - 1
    require(rows > 0, "batch size must be positive")
    require(int(cu_q[-1]) <= q.shape[0], "cu_seqlens_q must not end behind the last token")
    require(int(cu_q.diff().max()) <= longest_q, "rows longer than max_seqlen_q are left uncomputed")
    require(int(cu_k.diff().max()) <= longest_k, "rows longer than max_seqlen_k are left uncomputed")
    swapped = longest_q == 1 and q.shape[1] > k.shape[-2] and tuple(window) == (-1, -1) and slopes is None
    require(not swapped or q.shape[0] == rows, f"shape '[{rows}, ...]' is invalid for input of size {q.numel()}")


def _check_pages(cache: Tensor, table: Tensor, rows: int) -> None:
    require(cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    require(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32, its last dim contiguous")
    require(table.shape[0] == rows, "block_table must have a row a sequence")


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None, v: None, rotary_cos: None, rotary_sin: None,
    cache_seqlens: Tensor, cache_batch_idx: None, cache_leftpad: None, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: Any, softcap: float, rotary_interleaved: bool, alibi_slopes: Tensor | None,
    num_splits: int, return_softmax_lse: bool,
) -> Any:  # fmt: skip
    """Rows of equally many queries over pages."""
    _check(q, k_cache, v_cache)
    require(q.dim() == 4 and q.shape[0] > 0, "q must be [batch, len, heads, dim], batch size must be positive")
    require(cache_seqlens.dtype == torch.int32 and len(cache_seqlens) == q.shape[0], "seqlens_k must be int32 [batch]")
    _check_pages(k_cache, block_table, q.shape[0])
    rows = paged_rows(list(q), k_cache, v_cache, block_table, cache_seqlens.tolist())
    settings = _settings(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = _finish(*attend_rows(rows, q, v_cache.shape[-1], **settings), q)
    out = out.view(*q.shape[:-1], v_cache.shape[-1])
    return (out, lse.view(q.shape[:-1]).transpose(1, 2)) if return_softmax_lse else out


FUNCTIONS = {f.__name__: f for f in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)}
