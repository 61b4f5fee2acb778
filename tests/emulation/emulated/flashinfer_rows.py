"""flashinfer's plain functions for rows, heads and pages: not attention (see :mod:`emulated.flashinfer`).

They read 16 bytes at a time, and some by a tensor's shape alone: here a tensor that they would misread is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ROWS"]

HEAD_DIMS = (64, 128, 256, 512)


def _read(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.data_ptr() % 16 == 0, "misaligned address"
        assert all(n < 2 or s * x.itemsize % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)), (
            "misaligned address"
        )


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:  # noqa: A002
    return _norm(input, weight, eps, out, 0.0)


def gemma_rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:  # noqa: A002
    assert input.dim() == 2, "input must be a 2D tensor"
    return _norm(input, weight, eps, out, 1.0)


def _norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None, offset: float) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    _read(x, weight, out)
    assert x.dim() == out.dim()
    assert x.dim() in (2, 3)
    assert x.dtype == weight.dtype
    wide = x.float()
    return out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset))


def silu_and_mul(input: Tensor, out: Tensor = None) -> Tensor:  # type: ignore[assignment]  # noqa: A002
    return _gate(input, out, functional.silu)


def gelu_and_mul(input: Tensor, out: Tensor = None) -> Tensor:  # type: ignore[assignment]  # noqa: A002
    return _gate(input, out, functional.gelu)


def gelu_tanh_and_mul(input: Tensor, out: Tensor = None) -> Tensor:  # type: ignore[assignment]  # noqa: A002
    return _gate(input, out, lambda x: functional.gelu(x, approximate="tanh"))


def _gate(x: Tensor, out: Tensor | None, activation: Any) -> Tensor:
    """Rows are found by their number: a view would be misread."""
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2)) if out is None else out
    _read(x, out)
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert x.shape[-1] % 16 == 0
    gate, up = x.float().chunk(2, -1)
    return out.copy_(activation(gate) * up)


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:  # noqa: A002
    _added(input, residual, weight, eps, 0.0)


def gemma_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:  # noqa: A002
    _added(input, residual, weight, eps, 1.0)


def _added(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """The sum is rounded for the residual alone."""
    _read(x, residual, weight)
    assert x.dim() == residual.dim() == 2
    assert x.dtype == residual.dtype == weight.dtype
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset))


def layernorm(input: Tensor, gemma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:  # noqa: A002
    _read(input, gemma, beta)
    assert input.dim() == 2
    assert input.is_contiguous(), "rows are found by their number"
    assert (input.dtype, gemma.dtype, beta.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    return functional.layer_norm(input.float(), (input.shape[-1],), gemma, beta, eps).to(input.dtype)


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    outs = torch.empty_like(query), torch.empty_like(key)
    for x, out in zip((query, key), outs, strict=True):
        _turn(x, out, head_size, positions, cos_sin_cache, is_neox)
    return outs


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    for x in (query, key):
        _turn(x, x, head_size, positions, cos_sin_cache, is_neox)


def _turn(x: Tensor, out: Tensor, head_size: int, positions: Tensor, table: Tensor, neox: bool) -> None:
    """Eight cosines are loaded at a time, four of them used where pairs are interleaved."""
    assert table.dtype == torch.float32, "cos_sin_cache should be float32"
    assert table.is_contiguous()
    assert positions.is_contiguous()
    assert head_size in HEAD_DIMS
    rotary = table.shape[1]
    assert rotary % 16 == 0
    assert rotary <= head_size
    assert int(positions.max()) < len(table) - (not neox), "it reads behind the table"
    assert int(positions.min()) >= 0
    x, out = (y.view(y.shape[0], -1, head_size) for y in (x, out))
    _read(x, out)
    cos, sin = table[positions.long()].unsqueeze(1).chunk(2, -1)
    turned = x.float()
    pairs = (turned[..., : rotary // 2], turned[..., rotary // 2 : rotary])
    a, b = pairs if neox else (turned[..., :rotary:2], turned[..., 1:rotary:2])
    first, second = a * cos - b * sin, b * cos + a * sin
    whole = torch.cat((first, second), -1) if neox else torch.stack((first, second), -1).flatten(-2)
    out.copy_(torch.cat((whole, turned[..., rotary:]), -1))


def append_paged_kv_cache(
    append_key: Tensor, append_value: Tensor, batch_indices: Tensor, positions: Tensor, paged_kv_cache: Any,
    kv_indices: Tensor, kv_indptr: Tensor, kv_last_page_len: Tensor, kv_layout: str = "NHD",
) -> None:  # fmt: skip
    for numbers in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
        assert numbers.dim() == 1
        assert numbers.is_contiguous()
        assert numbers.dtype == torch.int32
    assert len(kv_indptr) == len(kv_last_page_len) + 1
    assert len(batch_indices) == len(positions) == len(append_key)
    k_cache, v_cache = paged_kv_cache
    assert k_cache.stride() == v_cache.stride(), "k/v strides must be identical"
    assert k_cache.dtype == append_key.dtype == append_value.dtype, "what is stored is what is given"
    heads, dim = append_key.shape[1:]
    assert dim in HEAD_DIMS
    assert heads * dim * append_key.itemsize // 16 <= 1024, "more threads than a block has"
    _read(append_key, append_value, k_cache, v_cache)
    assert int(positions.min()) >= 0, "it writes before the cache"
    for cache, values in ((k_cache, append_key), (v_cache, append_value)):
        pages = cache if kv_layout == "NHD" else cache.transpose(1, 2)
        slots = kv_indptr[batch_indices.long()] * pages.shape[1] + positions
        pages[kv_indices[slots // pages.shape[1]].long(), slots % pages.shape[1]] = values


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """LSEs in base 2; as before 0.7.4, two states without keys give NaN."""
    _read(v_a, v_b)
    assert v_a.is_contiguous()
    assert v_b.is_contiguous()
    assert s_a.is_contiguous()
    assert s_b.is_contiguous()
    heads, dim = v_a.shape[1:]
    assert dim in HEAD_DIMS
    assert heads * dim * v_a.itemsize // 16 <= 1024, "more threads than a block has"
    top = torch.maximum(s_a, s_b)
    a, b = torch.exp2(s_a - top), torch.exp2(s_b - top)
    v = (a / (a + b)).unsqueeze(-1) * v_a.float() + (b / (a + b)).unsqueeze(-1) * v_b.float()
    return v.to(v_a.dtype), torch.log2(a + b) + top


ROWS = (
    rmsnorm,
    gemma_rmsnorm,
    fused_add_rmsnorm,
    gemma_fused_add_rmsnorm,
    layernorm,
    silu_and_mul,
    gelu_and_mul,
    gelu_tanh_and_mul,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    append_paged_kv_cache,
    merge_state,
)
