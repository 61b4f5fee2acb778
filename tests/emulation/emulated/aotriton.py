"""The habits of torch's attention operators on ROCm, where AOTriton is behind them, over the formula.

Read from torch 2.6 to 2.13 (``aten/src/ATen/native/transformers/hip/flash_attn/aot/mha_all_aot.hip``,
``.../cuda/attention.cu``): causality counts from the first key; the LSE of a ragged call is ``[sequences, heads,
longest]``, and what is past a sequence's end in it is not written; ``_efficient_attention_forward`` wants as many kv
heads as query heads, and knows no mask but causality from the first key. Windows and ALiBi are not there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emulated import torch_attention
from emulated.attend import attend
from emulated.flash_attn_2 import require

__all__ = ["EFFICIENT", "FLASH"]

_NOTHING = torch.empty(0)
_SEED = torch.zeros((), dtype=torch.int64)
_FROM_THE_FIRST_KEY, _FROM_THE_LAST_KEY = 1, 2


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool, *, scale: float, window_size_left: None = None, window_size_right: None = None,
    seqused_k: None = None, alibi_slopes: None = None, block_table: None = None, num_splits: None = None,
) -> Any:  # fmt: skip
    require(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    require(window_size_left is None and window_size_right is None and alibi_slopes is None, "ignored with a warning")
    require(q.shape[-1] % 8 == 0 and q.shape[-1] == v.shape[-1], "head dims in eights")
    if cu_q is None or cu_k is None:
        require((max_q, max_k) == (q.shape[1], k.shape[1]), "max_q and max_k are the lengths of a dense batch")
        rows = list(zip(q, k, v, strict=True))
    else:
        lens = [cu.diff().tolist() for cu in (cu_q, cu_k)]
        require(max(lens[0]) <= max_q and max(lens[1]) <= max_k, "rows past the bounds are left uncomputed")
        rows = list(zip(q.split(lens[0]), k.split(lens[1]), v.split(lens[1]), strict=True))
    found = [_row(*row, scale, causal) for row in rows]
    lse = torch.full((len(found), q.shape[-2], max_q), math.nan)
    for row, (_, own) in enumerate(found):
        lse[row, :, : len(own)] = own.t()
    out = torch.cat([out for out, _ in found]).view(q.shape).to(q.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64), _NOTHING, _NOTHING


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Query ``i`` sees the keys up to ``i``, which is the alignment to the last key of as many queries as keys."""
    if not causal:
        return attend(q, k, v, scale=scale)
    missing = k.shape[0] - q.shape[0]
    require(missing >= 0, "never asked with more queries than keys here")
    out, lse = attend(functional.pad(q, (0, 0, 0, 0, 0, missing)), k, v, scale=scale, causal=True)
    return out[: len(q)], lse[: len(q)]


def _flash_backward(*args: Any, **kwargs: Any) -> Any:
    _, q, k, _, _, _, cu_q, cu_k, _, _, _, causal = args[:12]
    require(not causal or cu_q is cu_k is None or torch.equal(cu_q, cu_k), "only as many queries as keys are emulated")
    require(not causal or cu_q is not None or q.shape[1] == k.shape[1], "only as many queries as keys are emulated")
    return torch_attention.FLASH["_flash_attention_backward"](*args, **kwargs)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: None, cu_k: None, max_q: int | None, max_k: int | None,
    dropout: float, mask: int, wants_lse: bool = False, *, scale: float, seqlen_k: None = None,
    window_size: None = None,
) -> Any:  # fmt: skip
    require(q.shape[2] == k.shape[2] == v.shape[2], "query.size(2) == key.size(2)")
    require(cu_q is None and cu_k is None and bias is None and window_size is None, "not used here")
    require(mask in (0, _FROM_THE_FIRST_KEY), "[_efficient_attention_forward] Unsupported mask type on ROCM")
    found = [_row(*row, scale, mask == _FROM_THE_FIRST_KEY) for row in zip(q, k, v, strict=True)]
    out = torch.stack([out for out, _ in found]).to(q.dtype)
    lse = torch.stack([own.t() for _, own in found]) if wants_lse else torch.empty(q.shape[0], q.shape[2], 0)
    return out, lse, _SEED, _SEED, q.shape[1], k.shape[1]


def _efficient_backward(*args: Any, **kwargs: Any) -> Any:
    head, mask, rest = args[:14], args[14], args[15:]
    require(mask != _FROM_THE_FIRST_KEY or args[1].shape[1] == args[2].shape[1], "only as many queries as keys")
    mask = _FROM_THE_LAST_KEY if mask == _FROM_THE_FIRST_KEY else mask
    return torch_attention.EFFICIENT["_efficient_attention_backward"](*head, mask, *rest, **kwargs)


FLASH = {"_flash_attention_forward": _flash, "_flash_attention_backward": _flash_backward}
EFFICIENT = {"_efficient_attention_forward": _efficient, "_efficient_attention_backward": _efficient_backward}
