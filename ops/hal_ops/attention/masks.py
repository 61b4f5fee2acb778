"""Which keys a query sees, and how far away they are.

Positions are aligned to the end of the keys: query ``i`` of ``q_len`` stands at ``i + kv_len - q_len``. A key at
position ``j`` is seen when ``-left <= j - position <= right``, where a side that is None has no limit. Causality is
``right = 0``. Rows that see no key at all can only be the first ones: no left limit reaches past the end of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops.attention.request import Window

__all__ = ["alibi_bias", "empty_rows", "key_range", "relative", "sides", "visible"]


def sides(causal: bool, window: Window) -> Window:
    """The limits ``(left, right)`` that ``causal`` and ``window`` mean together."""
    return (window[0], 0) if causal else window


def empty_rows(q_len: int, kv_len: int, right: int | None) -> int:
    """How many of the first queries see no key."""
    if kv_len == 0 or right is None:
        return q_len if kv_len == 0 else 0
    return min(q_len, max(0, q_len - kv_len - right))


def key_range(first: int, last: int, q_len: int, kv_len: int, limits: Window) -> tuple[int, int]:
    """Keys ``[low, high)`` that the queries ``first`` to ``last`` (included) see between them."""
    left, right = limits
    shift = kv_len - q_len
    low = 0 if left is None else max(0, first + shift - left)
    high = kv_len if right is None else min(kv_len, last + shift + right + 1)
    return min(low, kv_len), max(high, min(low, kv_len))


def relative(rows: int, columns: int, offset: int, device: torch.device | str | None = None) -> Tensor:
    """Key position minus query position, int64 ``[rows, columns]``; query 0 stands at column ``offset``."""
    keys = torch.arange(columns, device=device)
    queries = torch.arange(offset, offset + rows, device=device)
    return keys - queries.unsqueeze(1)


def visible(distance: Tensor, limits: Window) -> Tensor:
    """Whether each query sees each key, given :func:`relative` distances. Bool, of the same shape."""
    left, right = limits
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    return seen


def alibi_bias(distance: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """``-slope * |distance|``, added to scaled scores. ``[heads, *distance.shape]`` in ``dtype``.

    The same as flash-attn's ``alibi_slopes`` (2.x, ``flash_attn_interface.py``): ``-slope * |i + kv_len - q_len - j|``.
    """
    return -slopes.to(dtype).view(-1, *[1] * distance.ndim) * distance.abs().to(dtype)
