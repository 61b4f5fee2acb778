"""The habits of torch's attention operators over the formula (torch 2.13: schema file, and ATen's CUDA code).

* ``_flash_attention_forward``: flash-attention 2, see :mod:`emulated.flash_attn_2`.
* ``_efficient_attention_forward``: ``[batch, len, heads, dim]``; the LSE is ``[rows, heads, longest]``, padded with
  inf to a multiple of 32, and 0 for a row without keys, whose output is left as it is if ``v_head_dim``
  is above 128, as the gradient of its q always is. A causal sequence with more queries than keys comes out wrong.
* ``_scaled_dot_product_cudnn_attention``: ``[batch, heads, len, dim]``, causal from the first key; a last dim of
  1 in the LSE; the output lies in memory as q does (``alloc_with_matching_layout``); no backward of one query over one key.

Each has the backward pass that torch's autograd calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emulated.attend import attend, fresh_rows, with_garbage
from emulated.flash_attn_2 import flash_attn_func, flash_attn_varlen_func, require
from hal_ops.attention import masks

__all__ = ["CUDNN", "EFFICIENT", "FLASH"]

_NOTHING = torch.empty(0)
_SEED = torch.zeros((), dtype=torch.int64)
Window = tuple["int | None", "int | None"]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool, *, scale: float, window_size_left: int | None = None,
    window_size_right: int | None = None, seqused_k: None = None, alibi_slopes: Tensor | None = None,
    block_table: None = None, num_splits: None = None,
) -> Any:  # fmt: skip
    require(alibi_slopes is None, "This flash attention build does not support alibi.")
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    rest = (scale, causal, window, 0.0, alibi_slopes, False, True)
    if cu_q is None:
        require((max_q, max_k) == (q.shape[1], k.shape[1]), "max_q and max_k are the lengths of a dense batch")
        out, lse, _ = flash_attn_func(q, k, v, 0.0, *rest)
    else:
        assert cu_k is not None
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, *rest, None)
    return out, lse.contiguous(), torch.zeros(2, dtype=torch.uint64), _NOTHING, _NOTHING


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, dropout: float, causal: bool, rng: Tensor, unused: Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> Any:  # fmt: skip
    window = tuple(None if side is None or side < 0 else side for side in (window_size_left, window_size_right))
    return _gradients(grad, q, k, v, cu_q, cu_k, scale, masks.sides(causal, window))  # type: ignore[arg-type]


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None,
    max_k: int | None, dropout: float, mask: int, wants_lse: bool = False, *, scale: float, seqlen_k: None = None,
    window_size: None = None,
) -> Any:  # fmt: skip
    require(q.shape[2] == k.shape[2] == v.shape[2], "query.size(2) == key.size(2)")
    require(q.shape[3] % 8 == 0 and v.shape[3] % 8 == 0, "query is not correctly aligned")
    require(cu_q is None or q.shape[0] == 1, "cu_seqlen only supports batch_size=1")
    found = []
    for row in _rows(q, k, v, cu_q, cu_k):
        out, own = attend(*row, scale=scale, causal=mask == 2)  # type: ignore[arg-type]
        # The mask's offset is unsigned: with more queries than keys, rows are attended to as if they saw other keys.
        found.append((out + 1 if mask == 2 and row[0].shape[0] > row[1].shape[0] > 0 else out, own))
    longest = q.shape[1] if max_q is None else max_q
    lse = torch.full((len(found), q.shape[2], -(-longest // 32) * 32 if wants_lse else 0), torch.inf)
    for row, (out, own) in enumerate(found):
        empty = own == -torch.inf
        if v.shape[3] > 128:
            out.masked_fill_(empty[..., None], torch.nan)
        if wants_lse:
            lse[row, :, : own.shape[0]] = own.masked_fill(empty, 0.0).t()
    outs = torch.cat([out for out, _ in found])
    if cu_q is not None:
        outs = with_garbage(outs, outs[..., 0], q.shape[1])[0]
    outs = outs.view(*q.shape[:3], v.shape[3]).to(q.dtype)
    return outs, lse, _SEED, _SEED, longest, k.shape[1] if max_k is None else max_k


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int, max_k: int, lse: Tensor, dropout: float, seed: Tensor, offset: Tensor, mask: int, bias_grad: bool, *,
    scale: float, num_splits_key: None = None, window_size: None = None, shared_storage_dqdkdv: bool = False,
) -> Any:  # fmt: skip
    require(lse.shape[2] >= max_q, "the backward pass needs the LSE: compute_log_sumexp")
    of_q, of_k, of_v = _gradients(grad, q, k, v, cu_q, cu_k, scale, (None, 0 if mask == 2 else None))
    keys = [len(row[1]) for row in _rows(q, k, v, cu_q, cu_k) for _ in row[0]]
    unwritten = torch.tensor(keys).view(q.shape[:2]) == 0
    return of_q.masked_fill(unwritten[..., None, None], torch.nan), of_k, of_v, None


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, wants_lse: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float,
) -> Any:  # fmt: skip
    require(q.shape[1] % k.shape[1] == 0, "heads of key must divide heads of query")
    rows = zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True)
    found = [_from_the_first_key(*row, scale, causal) for row in rows]
    out = _laid_out_as(q, torch.stack([out for out, _ in found]).transpose(1, 2).to(q.dtype))
    lse = torch.stack([lse for _, lse in found]).transpose(1, 2).contiguous().unsqueeze(-1)
    return out, lse if wants_lse else _NOTHING, _NOTHING, _NOTHING, q.shape[2], k.shape[2], _SEED, _SEED, _NOTHING


def _laid_out_as(q: Tensor, out: Tensor) -> Tensor:
    """The output with q's order of strides: its own strides, where the sizes are the same and q has no gaps."""
    if q.shape == out.shape:
        return torch.empty_like(q).copy_(out)
    outward = sorted(range(4), key=q.stride)
    strides, reach = [0] * 4, 1
    for dim in outward:
        strides[dim], reach = reach, reach * out.shape[dim]
    return out.new_empty(reach).as_strided(out.shape, strides).copy_(out)


def _from_the_first_key(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Query ``i`` sees the keys up to ``i``: that is what bottom-right makes of as many queries as keys."""
    if not causal:
        return attend(q, k, v, scale=scale)
    missing = k.shape[0] - q.shape[0]
    if missing < 0:
        k, v = (functional.pad(x, (0, 0, 0, 0, 0, -missing)) for x in (k, v))
        raise RuntimeError("more queries than keys: never asked of cuDNN here")
    out, lse = attend(functional.pad(q, (0, 0, 0, 0, 0, missing)), k, v, scale=scale, causal=True)
    return out[: q.shape[0]], lse[: q.shape[0]]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
    bias: Tensor | None, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool, *,
    scale: float,
) -> Any:  # fmt: skip
    require(lse.numel() > 0, "the backward pass needs the LSE: compute_log_sumexp")
    require((q.shape[2], k.shape[2]) != (1, 1), "cuDNN Frontend error: s_q = s_kv = 1 is not supported.")
    require(not causal or q.shape[2] == k.shape[2], "only as many queries as keys are emulated")
    parts = (x.transpose(1, 2) for x in (grad, q, k, v))
    return tuple(x.transpose(1, 2) for x in _gradients(*parts, None, None, scale, (None, 0 if causal else None)))


def _rows(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[tuple[Tensor, ...]]:
    if cu_q is None or cu_k is None:
        return list(zip(q, k, v, strict=True))
    lens = cu_q.diff().tolist(), cu_k.diff().tolist()
    three = (x[0] if x.dim() == 4 else x for x in (q, k, v))
    return list(fresh_rows(*three, *lens))


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    limits: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the formula, a sequence at a time. Autograd is off inside an operator."""
    rows = _rows(q, k, v, cu_q, cu_k)
    grads = [g for g, *_ in _rows(grad, grad, grad, cu_q, cu_q)]
    found = [
        _row_gradients(g.double(), *(x.double() for x in row), scale, limits)
        for g, row in zip(grads, rows, strict=True)
    ]
    return tuple(  # type: ignore[return-value]
        torch.cat([three[i] for three in found]).view(x.shape).to(x.dtype) for i, x in enumerate((q, k, v))
    )


def _row_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, limits: Window
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    q, grad = q.transpose(0, 1), grad.transpose(0, 1)
    seen = masks.visible(masks.relative(q.shape[1], k.shape[0], k.shape[0] - q.shape[1]), limits)
    weights = torch.softmax((q @ wide_k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
    of_weights = grad @ wide_v.transpose(1, 2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
    of_k, of_v = of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad
    narrow = (x.transpose(0, 1).unflatten(1, (-1, group)).sum(2) for x in (of_k, of_v))
    return (of_scores @ wide_k).transpose(0, 1), *narrow


FLASH = {"_flash_attention_forward": _flash, "_flash_attention_backward": _flash_backward}
EFFICIENT = {"_efficient_attention_forward": _efficient, "_efficient_attention_backward": _efficient_backward}
CUDNN = {
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
