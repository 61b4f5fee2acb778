"""flash-attention 3's habits over the formula (upstream 0251105a, ``hopper/flash_api.cpp``; tokenspeed-fa3 for sinks).

* LSE natural, ``[batch, heads, len]`` or ``[heads, tokens]``, -inf for a row without keys, +inf where there is no key
  at all; ``flash_attn_with_kvcache`` returns four values with it.
* scheduler metadata of exactly the launch's size; here it also carries what it was made with, and is held to that.
* over pages that TMA reads whole, NaN in slots past a row's length reaches the output.
* e4m3 for all three operands or for none, scales ``[batch, kv_heads]``, output bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend_rows, fresh_rows, leak_past, paged_rows, with_garbage
from emulated.flash_attn_2 import require

__all__ = ["FUNCTIONS", "WITH_SINKS", "metadata_size", "tile_of"]

_FP8 = torch.float8_e4m3fn
_DTYPES = (torch.float16, torch.bfloat16, _FP8)


def tile_of(dim: int, v_dim: int, causal: bool, local: bool, size: int) -> tuple[int, int]:
    """Queries and keys of a tile on sm_90 (``hopper/tile_size.h``), where pages are read by TMA."""
    if size == 1:
        wide = 64 if local else 128
        table = ((64, (192, 160)), (96, (192, 128)), (128, (128, 224)), (192, (128, 160)), (256, (128, wide)))
    else:
        few = causal or local
        table = (
            (64, {512: (64, 64), 256: (128, 96)}.get(v_dim, (192, 128 if few else 192))),
            (96, (192, 128 if local else 144)),
            (128, (128, 128 if few else 176)),
            (192, (128, 96 if local else 128 if v_dim <= 128 else 112)),
            (256, (128, 64 if local else 80)),
        )
    return next(tile for most, tile in table if dim <= most)


def _masks(causal: bool, window: Any, longest_q: int, longest_k: int, dim: int, paged: bool) -> tuple[bool, bool]:
    """(is_causal, is_local) as the launch derives them."""
    left, right = window
    left = -1 if left >= longest_k - 1 else left
    right = -1 if right >= longest_q - 1 else right
    if longest_q == 1 and left == right == -1 and (dim <= 64 or dim > 128 or not paged):
        causal = False
    right = 0 if causal else right
    is_causal = left < 0 and right == 0
    return is_causal, (left >= 0 or right >= 0) and not is_causal


def metadata_size(batch: int, causal: bool, window: Any, longest_q: int, longest_k: int, dim: int) -> int:
    """Numbers of scheduler metadata on sm_90."""
    is_causal, is_local = _masks(causal, window, longest_q, longest_k, dim, True)
    vectors = 2 + (0 if is_local else 1) + (1 if is_causal or is_local else 0)
    return (batch + 3) // 4 * 4 * vectors + 1


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype, headdim_v: int | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: None, cache_leftpad: None, page_size: int | None, max_seqlen_k_new: int, causal: bool,
    window_size: Any, attention_chunk: int, has_softcap: bool, num_splits: int, pack_gqa: bool | None, sm_margin: int,
) -> Tensor:  # fmt: skip
    """The planner: the right size, and in its first numbers what the launch must agree with."""
    made = torch.zeros(
        metadata_size(batch_size, causal, window_size, max_seqlen_q, max_seqlen_k, headdim), dtype=torch.int32
    )
    numbers = _numbers(
        max_seqlen_q, max_seqlen_k, page_size or 0, causal, window_size, num_splits, has_softcap, qkv_dtype,
        headdim_v or headdim, cache_seqlens,
    )  # fmt: skip
    made[: len(numbers)] = torch.tensor(numbers)
    return made


def _numbers(
    longest_q: int, longest_k: int, size: int, causal: bool, window: Any, splits: int, softcap: bool,
    dtype: torch.dtype, v_dim: int, kv_lens: Tensor,
) -> list[int]:  # fmt: skip
    """What metadata is made with: for the lengths their sum, which stands for how rows are split and ordered by them."""
    shape = [longest_q, longest_k, size, int(causal), *window, splits, int(softcap), _DTYPES.index(dtype), v_dim]
    return [*shape, int(kv_lens.sum())]


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    dim, v_dim = q.shape[-1], v.shape[-1]
    require(q.dtype in _DTYPES, "FlashAttention only supports fp16, bf16, and fp8_e4m3")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    require(dim <= 256 and dim % (16 if q.dtype == _FP8 else 8) == 0, "head_size must be a multiple of 8 (fp8: 16)")
    unequal = (128 < dim <= 192 and 96 < v_dim <= 128) or (dim <= 64 and v_dim <= 512)
    require(dim == v_dim or unequal, "head dims of V and of Q and K do not fit each other")
    require(v_dim <= 256 or not q.requires_grad, "the backward pass supports head dimension at most 256")
    require(sinks is None or sinks.dtype == torch.bfloat16, "sinks must have dtype bfloat16")


def _settings(scale: float, causal: bool, window: Any, softcap: float, sinks: Tensor | None) -> Any:
    left, right = (None if side < 0 else side for side in window)
    sinks = None if sinks is None else sinks.float()
    return {"scale": scale, "causal": causal, "window": (left, right), "softcap": softcap, "sinks": sinks}


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, qv: None,
    q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None, window_size: Any,
    attention_chunk: int, softcap: float, num_splits: int, pack_gqa: bool | None, deterministic: bool,
    sm_margin: int, return_attn_probs: bool, sinks: Tensor | None = None,
) -> Any:  # fmt: skip
    """Dense."""
    _check(q, k, v, sinks)
    settings = _settings(softmax_scale, causal, window_size, softcap, sinks)
    rows = _scaled(list(zip(q, k, v, strict=True)), (q_descale, k_descale, v_descale), q, k)
    out, lse = attend_rows(rows, q, v.shape[-1], **settings)
    out = out.view(*q.shape[:-1], v.shape[-1]).to(_out_dtype(q))
    lse = lse.detach().view(q.shape[:-1]).transpose(1, 2)
    lse = lse if k.numel() else torch.full_like(lse, torch.inf)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: None, seqused_k: None, softmax_scale: float, causal: bool, qv: None,
    q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None, window_size: Any,
    attention_chunk: int, softcap: float, num_splits: int, pack_gqa: bool | None, deterministic: bool,
    sm_margin: int, return_attn_probs: bool, sinks: Tensor | None = None,
) -> Any:  # fmt: skip
    """Ragged, over fresh keys."""
    _check(q, k, v, sinks)
    q_lens, kv_lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    require(max(q_lens) <= max_seqlen_q, "rows longer than max_seqlen_q are left uncomputed")
    require(max(kv_lens) <= max_seqlen_k, "rows longer than max_seqlen_k are left uncomputed")
    rows = _scaled(fresh_rows(q, k, v, q_lens, kv_lens), (q_descale, k_descale, v_descale), q, k)
    out, lse = attend_rows(rows, q, v.shape[-1], **_settings(softmax_scale, causal, window_size, softcap, sinks))
    leak_past(out, v, q_lens, kv_lens)
    out, lse = with_garbage(out, lse, q.shape[0])
    out = out.to(_out_dtype(q))
    return (out, lse.detach().t()) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: None, v: None, qv: Tensor | None, rotary_cos: None, rotary_sin: None,
    cache_seqlens: Tensor, cache_batch_idx: None, cache_leftpad: None, page_table: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k_new: None, max_seqlen_q: int, rotary_seqlens: None, q_descale: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, softmax_scale: float, causal: bool, window_size: Any,
    attention_chunk: int, softcap: float, rotary_interleaved: bool, scheduler_metadata: Tensor | None,
    num_splits: int, pack_gqa: bool | None, sm_margin: int, return_softmax_lse: bool, sinks: Tensor | None = None,
) -> Any:  # fmt: skip
    """Ragged queries over pages."""
    _check(q, k_cache, v_cache, sinks)
    size, width = k_cache.shape[1], page_table.shape[1] * k_cache.shape[1]
    lens = cu_seqlens_q.diff().tolist()
    require(page_table.dtype == torch.int32 and page_table.stride(-1) == 1, "page_table must be int32")
    require(max(lens) <= max_seqlen_q, "rows longer than max_seqlen_q are left uncomputed")
    if scheduler_metadata is not None:
        made_with = _numbers(
            max_seqlen_q, width, size, causal, window_size, num_splits, softcap > 0, q.dtype, v_cache.shape[-1],
            cache_seqlens,
        )  # fmt: skip
        _check_metadata(scheduler_metadata, len(lens), causal, window_size, max_seqlen_q, width, q.shape[-1], made_with)
    used = sum(lens)
    q_all, k_all = q, k_cache
    if qv is not None:
        _check_qv(q, v_cache, qv)
        q_all, k_all = torch.cat([q, qv], -1), torch.cat([k_cache, v_cache], -1)
    rows = paged_rows(q_all[:used].split(lens), k_all.float(), v_cache.float(), page_table, cache_seqlens.tolist())
    rows = _scaled(rows, (q_descale, k_descale, v_descale), q, k_cache)
    settings = _settings(softmax_scale, causal, window_size, softcap, sinks)
    out, lse = attend_rows(rows, q, v_cache.shape[-1], **settings)
    masks = _masks(causal, window_size, max_seqlen_q, width, q.shape[-1], True)
    _leak(out, lens, v_cache, page_table, cache_seqlens.tolist(), q, max_seqlen_q, masks)
    out, lse = with_garbage(out, lse, q.shape[0])
    out = out.to(_out_dtype(q))
    return (out, lse.t(), torch.empty(0), torch.empty(0)) if return_softmax_lse else out


def _check_qv(q: Tensor, v: Tensor, qv: Tensor) -> None:
    """The scores are of q and k and of qv and v together (``flash_api.cpp``, the checks of ``q_v_``)."""
    require(q.dtype in (torch.float16, torch.bfloat16), "q_v is only supported for fp16 and bf16 data type")
    require(q.shape[-1] <= 64, "q_v is only supported for head_size <= 64")
    require(v.shape[-1] >= 256, "q_v is only supported for hdim_v >= 256.")
    require(qv.shape == (*q.shape[:-1], v.shape[-1]), "q_v must have shape (total_q, num_heads, head_size_v)")
    require(qv.dtype == q.dtype and qv.stride(-1) == 1, "q_v must have the same dtype as query, and be contiguous")


def _check_metadata(
    found: Tensor, batch: int, causal: bool, window: Any, longest_q: int, longest_k: int, dim: int, made_with: list[int]
) -> None:
    size = metadata_size(batch, causal, window, longest_q, longest_k, dim)
    require(found.dtype == torch.int32 and found.shape == (size,), f"scheduler_metadata must have shape ({size})")
    held = found[: len(made_with)].tolist()
    require(held == made_with, f"metadata of another step: {held}, this is {made_with}")


def _out_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == _FP8 else q.dtype


def _scaled(rows: Any, scales: tuple[Tensor | None, ...], q: Tensor, k: Tensor) -> Any:
    if q.dtype != _FP8:
        require(all(scale is None for scale in scales), "descale without fp8 has no effect")
        return rows
    group = q.shape[-2] // k.shape[-2]
    require(
        all(s is None or (s.dtype == torch.float32 and s.shape == (len(rows), k.shape[-2])) for s in scales),
        "descale must be float32 [batch, kv_heads]",
    )
    made = []
    for index, three in enumerate(rows):
        factors = [torch.ones(k.shape[-2]) if s is None else s[index] for s in scales]
        factors[0] = factors[0].repeat_interleave(group)
        made.append(tuple(x.float() * f[:, None] for x, f in zip(three, factors, strict=True)))
    return made


def _leak(
    out: Tensor,
    lens: list[int],
    v_cache: Tensor,
    table: Tensor,
    kv_lens: list[int],
    q: Tensor,
    longest: int,
    masks: Any,
) -> None:
    """``0 * NaN`` of the slots that a last tile reads past a row's length."""
    rows, keys = tile_of(q.shape[-1], v_cache.shape[-1], *masks, q.element_size())
    size = v_cache.shape[1]
    if size % keys or longest * (q.shape[1] // v_cache.shape[2]) <= rows:
        return
    start = 0
    for row, (q_len, kv_len) in enumerate(zip(lens, kv_lens, strict=True)):
        past = kv_len % keys
        if q_len and past:
            page = v_cache[int(table[row, (kv_len - 1) // size])].float()
            at = kv_len - (kv_len - 1) // size * size
            rest = page[at : at + keys - past]
            out[start : start + q_len] += (rest.repeat_interleave(q.shape[1] // rest.shape[1], 1) * 0).sum(0)
        start += q_len


WITH_SINKS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata)
}
FUNCTIONS = WITH_SINKS
"""Upstream's functions are the same ones, called without the last argument."""
