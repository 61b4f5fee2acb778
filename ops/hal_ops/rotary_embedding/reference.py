"""The oracle of the rotary embedding: the formula. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._torch_rows import deliver, wide_format
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest
from hal_ops.rows import empty_like

__all__ = ["Pair", "outputs", "rotary_embedding"]

Pair = tuple[Tensor, Tensor]


def outputs(request: RotaryEmbeddingRequest) -> Callable[..., Pair]:
    """Makes empty outputs from the call's arguments."""

    def empty(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Pair:
        return empty_like(q), empty_like(k)

    return empty


def rotary_embedding(
    request: RotaryEmbeddingRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Callable[..., Pair]:
    """The ``call`` phase. ``rounded=False`` leaves the outputs in the format of the sums."""
    wide, dim = wide_format(request.dtype, accumulate), request.rotary_dim
    first = list(range(dim // 2)) if request.style == "neox" else list(range(0, dim, 2))
    second = [i + dim // 2 if request.style == "neox" else i + 1 for i in first]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result = x.to(wide).clone()
        a, b = x[..., first].to(wide), x[..., second].to(wide)
        result[..., first] = a * cos - b * sin
        result[..., second] = b * cos + a * sin
        return result

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Pair | None = None) -> Pair:
        cos, sin = (functional.embedding(positions, table).to(wide).unsqueeze(-2) for table in (cos, sin))
        q_out, k_out = (None, None) if out is None else out
        dtype = q.dtype if rounded else wide
        return deliver(turned(q, cos, sin), dtype, q_out), deliver(turned(k, cos, sin), dtype, k_out)

    return call
