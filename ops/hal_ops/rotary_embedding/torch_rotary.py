"""The rotary embedding by torch's operators. Any device; autograd passes through.

What :func:`rotary_embedding` honours: ``dtype`` float64, float32, bfloat16, float16; tables in any of these; any heads,
head dim and rotary dim; both styles; inputs of any strides; deterministic; graph: nothing waits for the device. A
position outside the tables raises on the CPU, and stops an accelerator with its own assertion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hal_ops._dtypes import torch_dtype
from hal_ops._torch_rows import deliver, wide_format
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.reference import Pair

__all__ = ["rotary_embedding"]


def rotary_embedding(request: RotaryEmbeddingRequest, device: object) -> Callable[..., Pair]:
    """The ``call`` phase."""
    dtype, wide = torch_dtype(request.dtype), wide_format(request.dtype)
    turn = _turn_halves if request.style == "neox" else _turn_neighbours
    dim = request.rotary_dim

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result = turn(x[..., :dim].to(wide), cos, sin)
        return result if dim == x.shape[-1] else torch.cat((result, x[..., dim:].to(wide)), -1)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Pair | None = None) -> Pair:
        cos, sin = (functional.embedding(positions, table).to(wide).unsqueeze(-2) for table in (cos, sin))
        q_out, k_out = (None, None) if out is None else out
        return deliver(turned(q, cos, sin), dtype, q_out), deliver(turned(k, cos, sin), dtype, k_out)

    return call


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
