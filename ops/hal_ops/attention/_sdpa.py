"""Attention of equally long sequences by torch's fused CPU attention, in tiles of queries.

What torch's own function does not do, and what is done about it here:

* ``is_causal`` is aligned to the *first* key (torch 2.6.0, 2.9.1 and 2.13.0 run here): it is used only where queries
  and keys are equally many. Elsewhere the queries are cut into tiles, each with the keys that it can see, so that
  neither a mask of ``q_len * kv_len`` nor work outside a window is ever paid for.
* A row whose mask hides every key gives out 0 and logsumexp 0 rather than -inf; no keys at all crash the fused
  function. Rows without keys can only be the first ones, and are cut off before.
* Fewer kv heads than q heads: the queries of one kv head are folded into the rows. This needs no support by torch
  (2.6's fused function reads past the end of k and v when it is given fewer heads), copies no keys, and turns one-row
  products into several-row ones.
* ``v_head_dim`` other than ``head_dim``: the shorter one is padded with zeros.
* The softmax's logsumexp is returned by a private operator only. It is checked on first use against the formula,
  which takes its place if the check fails, and wherever a gradient must flow through it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from hal_ops.attention import masks
from hal_ops.attention.request import AttentionRequest, Window

__all__ = ["Shape", "attend", "fused_gqa", "logsumexp_works"]

_TILE_ROWS = 256
_BIAS_AT_ONCE = 1 << 22
_SMALL_MASK = 1 << 18


class Shape(NamedTuple):
    """The part of a request that :func:`attend` needs."""

    kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    scale: float
    limits: Window
    differentiable: bool

    @classmethod
    def of(cls, request: AttentionRequest) -> Shape:
        return cls(
            request.num_kv_heads,
            request.group_size,
            request.head_dim,
            request.v_head_dim,
            request.softmax_scale,
            masks.sides(request.causal, request.window),
            request.needs_grad,
        )

    def within(self, q_len: int, kv_len: int) -> Shape:
        """The same without the limits that no key of so short a sequence is beyond."""
        left, right = self.limits
        limits = (
            None if left is None or left >= kv_len - 1 else left,
            None if right is None or right >= q_len - 1 > 0 else right,
        )
        return self if limits == self.limits else self._replace(limits=limits)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    *,
    slopes: Tensor | None = None,
    hidden: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q ``[n, q_len, q_heads, head_dim]`` over k and v ``[n, kv_len, kv_heads, dim]``, all of one dtype.

    ``hidden`` is added to the scores, ``[n, 1, 1, kv_len]``: -inf hides a key of one sequence. It must leave each row
    a key. Returns out ``[n, q_len, q_heads, v_head_dim]``, contiguous, and lse ``[n, q_len, q_heads]`` or None.
    """
    q_len, kv_len = q.shape[1], k.shape[1]
    shape = shape.within(q_len, kv_len)
    skipped = masks.empty_rows(q_len, kv_len, shape.limits[1])
    if skipped == q_len:
        return _nothing(q, q_len, shape)
    if skipped:
        out, lse = attend(q[:, skipped:], k, v, shape, slopes=slopes, hidden=hidden, with_lse=with_lse)
        zeros, minus = _nothing(q, skipped, shape)
        return torch.cat([zeros, out], 1), None if lse is None else torch.cat([minus, lse], 1)
    q, k, v = _same_dims(q, k, v, shape)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if q_len == kv_len and shape.limits == (None, 0) and slopes is None and hidden is None:
        return _square(q, k, v, shape, with_lse)
    rows = _rows_a_tile(q, k, shape, slopes)
    parts = enumerate(torch.split(q, rows, 1))
    tiles = [_tile(part, i * rows, q_len, k, v, shape, slopes, hidden, with_lse) for i, part in parts]
    out = tiles[0][0] if len(tiles) == 1 else torch.cat([out for out, _ in tiles], 1)
    lses = [lse for _, lse in tiles if lse is not None]
    return out[..., : shape.v_head_dim].contiguous(), torch.cat(lses, 1) if with_lse else None


def _nothing(q: Tensor, rows: int, shape: Shape) -> tuple[Tensor, Tensor]:
    size = (q.shape[0], rows, shape.kv_heads * shape.group)
    lse = q.new_full(size, -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_zeros((*size, shape.v_head_dim)), lse


def _same_dims(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    missing = shape.head_dim - shape.v_head_dim
    if missing > 0:
        return q, k, functional.pad(v, (0, missing))
    return (functional.pad(q, (0, -missing)), functional.pad(k, (0, -missing)), v) if missing else (q, k, v)


def _square(q: Tensor, k: Tensor, v: Tensor, shape: Shape, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Causal attention of as many queries as keys: the only case that torch's ``is_causal`` means the same."""
    if shape.group > 1 and (not fused_gqa() or with_lse):
        k, v = k.repeat_interleave(shape.group, 1), v.repeat_interleave(shape.group, 1)
    out, lse = _softmax(q.transpose(1, 2), k, v, None, True, shape, with_lse)
    out = out.transpose(1, 2)[..., : shape.v_head_dim].contiguous()
    return out, None if lse is None else lse.transpose(1, 2)


def _rows_a_tile(q: Tensor, k: Tensor, shape: Shape, slopes: Tensor | None) -> int:
    """Queries a tile: enough to keep the products busy, few enough to keep masks small and triangles thin."""
    if slopes is None and shape.limits == (None, None):
        return q.shape[1]
    rows = max(1, _TILE_ROWS // shape.group)
    if slopes is None:
        return rows
    return max(1, min(rows, _BIAS_AT_ONCE // (k.shape[2] * shape.group * shape.kv_heads)))


def _tile(
    q: Tensor,
    start: int,
    q_len: int,
    k: Tensor,
    v: Tensor,
    shape: Shape,
    slopes: Tensor | None,
    hidden: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The queries from ``start`` on, q ``[n, rows, heads, dim]``, over the keys that they see."""
    kv_len = k.shape[2]
    n, rows, _, dim = q.shape
    low, high = masks.key_range(start, start + rows - 1, q_len, kv_len, shape.limits)
    offset = start + kv_len - q_len - low
    bias = _bias(rows, high - low, offset, shape, slopes, q)
    if hidden is not None:
        bias = hidden[..., low:high] if bias is None else bias + hidden[..., low:high]
    folded = q.reshape(n, rows, shape.kv_heads, shape.group, dim).transpose(1, 2).reshape(n, shape.kv_heads, -1, dim)
    out, lse = _softmax(folded, k[:, :, low:high], v[:, :, low:high], bias, False, shape, with_lse)
    heads = (n, shape.kv_heads, rows, shape.group)
    out = out.reshape(*heads, -1).transpose(1, 2).reshape(n, rows, shape.kv_heads * shape.group, -1)
    return out, None if lse is None else lse.reshape(heads).transpose(1, 2).reshape(n, rows, -1)


def _bias(rows: int, columns: int, offset: int, shape: Shape, slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to a tile's scores, broadcastable to ``[1, kv_heads, rows * group, columns]``; None for nothing."""
    left, right = shape.limits
    all_seen = (right is None or columns - 1 - offset <= right) and (left is None or offset + rows - 1 <= left)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if slopes is None and all_seen:
        return None
    make = _mask if rows * columns * shape.group > _SMALL_MASK else _kept_mask
    mask = make(rows, columns, offset, shape.limits, shape.group, dtype, q.device)
    if slopes is None:
        return mask
    distance = masks.relative(rows, columns, offset, q.device)
    bias = masks.alibi_bias(distance, slopes, dtype).view(shape.kv_heads, shape.group, rows, columns)
    return bias.transpose(1, 2).reshape(1, shape.kv_heads, rows * shape.group, columns) + mask


def _mask(
    rows: int, columns: int, offset: int, limits: Window, group: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """0 where a key is seen, -inf elsewhere: ``[1, 1, rows * group, columns]``."""
    # A mask that is kept may be met again by a call that records gradients, which inference tensors cannot serve.
    with torch.inference_mode(False), torch.no_grad():
        seen = masks.visible(masks.relative(rows, columns, offset, device), limits)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
        return mask.repeat_interleave(group, 0).view(1, 1, rows * group, columns)


_kept_mask = lru_cache(maxsize=32)(_mask)


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, shape: Shape, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[n, heads, rows, dim]`` with as many heads everywhere, and its lse if asked for."""
    if q.shape[2] == 1 and q.dtype == torch.bfloat16:
        # One-row bfloat16 products take a slow path in torch's CPU gemm (2.13.0: 3 to 6 times the time of two rows).
        out, lse = _softmax(q.expand(-1, -1, 2, -1).contiguous(), k, v, bias, causal, shape, with_lse)
        return out[:, :, :1], None if lse is None else lse[:, :, :1]
    if with_lse:
        by_operator = not shape.differentiable and logsumexp_works()
        return (_operator if by_operator else _formula)(q, k, v, bias, causal, shape.scale)
    gqa = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=shape.scale, enable_gqa=gqa)
    return out, None


def _operator(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = fused(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out, lse


def _formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The same from plain operations: slower, differentiable in both results."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(2, 3) * scale
    if causal:
        scores = scores + _mask(q.shape[2], k.shape[2], 0, (None, 0), 1, dtype, q.device)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ v.to(dtype)).to(q.dtype), lse


@cache
def logsumexp_works() -> bool:
    """Whether torch's private operator exists and returns the natural logsumexp in the layout seen so far."""
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return False
    with torch.inference_mode(False), torch.no_grad():
        q = torch.linspace(-2.0, 2.0, 2 * 3 * 5 * 8).view(2, 3, 5, 8)
        k, v = q.flip(2, 3) * 1.5, q.roll(1, 2)
        bias = _mask(5, 5, 1, (2, 1), 1, torch.float32, q.device)
        wanted = _formula(q, k, v, bias, False, 0.5)
        try:
            found = _operator(q, k, v, bias, False, 0.5)
        except (RuntimeError, TypeError):
            # Another torch may have given the private operator other arguments; the formula needs none of it.
            return False
        same = (a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
        return all(same)


@cache
def fused_gqa() -> bool:
    """Whether torch's fused CPU attention takes fewer kv heads than q heads (2.9.1 does, 2.6.0 does not)."""
    with torch.inference_mode(False), torch.no_grad():
        q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)
        choose = getattr(torch, "_fused_sdp_choice", None)
        return choose is not None and int(choose(q, k, k, enable_gqa=True)) == SDPBackend.FLASH_ATTENTION.value
