"""flashinfer's rotary embedding behind the contract of ``rotary_embedding``.

``apply_rope_with_cos_sin_cache`` reads cosines and sines of one float32 table, and beside it where a position is outside.
So each token is given its own row of a table that is made of the two that the contract has: a position outside of those
raises there. With interleaved pairs it loads 16 bytes more than it uses (``pos_enc.cuh``, "reuse_half"): the table ends
with a row that is nobody's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import LAST, readable
from hal_ops.rotary_embedding import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.reference import Pair, outputs

__all__ = ["rotary_embedding"]


def rotary_embedding(request: RotaryEmbeddingRequest, device: hal.Device) -> Callable[..., Pair]:
    """``apply_rope_with_cos_sin_cache``, or the one that works in place where ``out`` is q and k."""
    library = importlib.import_module("flashinfer.rope")
    fresh, inplace = library.apply_rope_with_cos_sin_cache, library.apply_rope_with_cos_sin_cache_inplace
    dim, neox, empty = request.head_dim, request.style == "neox", outputs(request)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Pair | None = None) -> Pair:
        if not positions.numel():
            return empty(q, k, cos, sin, positions) if out is None else out
        numbers, table = _by_token(cos, sin, positions)
        places = q.data_ptr() | k.data_ptr()
        if out is None and q.dim() == 3 and q.is_contiguous() and k.is_contiguous() and not places & LAST:
            found: Pair = fresh(numbers, q, k, dim, table, neox)
            return found
        tokens = _tokens(q), _tokens(k)
        if out is not None and _is(q, out[0], tokens[0]) and _is(k, out[1], tokens[1]):
            inplace(numbers, *tokens, dim, table, neox)
            return out
        turned = [x.contiguous() for x in fresh(numbers, *tokens, dim, table, neox)]
        q_out, k_out = turned[0].view(q.shape), turned[1].view(k.shape)
        return (q_out, k_out) if out is None else (out[0].copy_(q_out), out[1].copy_(k_out))

    return call


def _by_token(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' numbers, and a table with a row for each, float32 ``[tokens + 1, rotary_dim]``."""
    if positions.dim() != 1:
        positions = positions.view(-1)
    count, half = positions.shape[0], cos.shape[1]
    table = torch.empty(count + 1, 2 * half, dtype=torch.float32, device=cos.device)
    # Of all ways to a view as_strided costs least.
    size, strides = (count, half), (2 * half, 1)
    left, right = table.as_strided(size, strides), table.as_strided(size, strides, half)
    if cos.dtype == torch.float32:
        torch.index_select(cos, 0, positions, out=left)
        torch.index_select(sin, 0, positions, out=right)
    else:
        left.copy_(cos.index_select(0, positions))
        right.copy_(sin.index_select(0, positions))
    return torch.arange(count, dtype=torch.int32, device=cos.device), table


def _tokens(x: Tensor) -> Tensor:
    return readable(x.reshape(-1, *x.shape[-2:]))


def _is(x: Tensor, out: Tensor, tokens: Tensor) -> bool:
    """Whether what is turned in place is x itself."""
    return out is x and tokens.data_ptr() == x.data_ptr()
