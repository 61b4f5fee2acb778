"""aiter's rotary embedding behind the contract of ``rotary_embedding``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_ops.rotary_embedding import RotaryEmbeddingRequest

__all__ = ["rotary_embedding"]

Pair = tuple[Tensor, Tensor]
_STYLES = {"neox": 0, "interleaved": 1}


def rotary_embedding(request: RotaryEmbeddingRequest, device: hal.Device) -> Callable[..., Pair]:
    """``rope_cached_positions_2c_fwd_impl``: both tensors in one launch.

    It skips tokens whose positions are outside the tables; here they become NaN, as the contract says.
    """
    function = importlib.import_module("aiter.ops.rope").rope_cached_positions_2c_fwd_impl
    style = _STYLES[request.style]

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Pair | None = None) -> Pair:
        given = out or (None, None)
        targets = tuple(_target(x, to) for x, to in zip((q, k), given, strict=True))
        places = positions.reshape(_lead(q)).long().contiguous()
        tables = [table.contiguous().view(table.shape[0], 1, 1, -1) for table in (cos, sin)]
        if q.numel():
            views = [_four(x) for x in (*targets, q, k)]
            function(*views, *tables, places, style, True, False)
        outside = ((positions < 0) | (positions >= cos.shape[0]))[..., None, None]
        for x, target in zip((q, k), targets, strict=True):
            if target is x:
                target.masked_fill_(outside, math.nan)
        return targets[0], targets[1]

    return call


def _target(x: Tensor, out: Tensor | None) -> Tensor:
    """Where to write: x itself, or a tensor of NaN."""
    if out is x:
        return out
    return torch.full_like(x, math.nan, memory_format=torch.contiguous_format) if out is None else out.fill_(math.nan)


def _lead(x: Tensor) -> tuple[int, int]:
    """The leading dims of ``[..., heads, dim]`` as two."""
    return (x.shape[0], math.prod(x.shape[1:-2])) if x.dim() > 3 else (math.prod(x.shape[:-2]), 1)


def _four(x: Tensor) -> Tensor:
    """``[s, b, heads, dim]``, a view.

    Raises:
        RuntimeError: the dims between the first and the heads do not fold into one.
    """
    return x.view(*_lead(x), *x.shape[-2:])
