"""The habits of aiter's kernels for rows, rotary embeddings and cache writes, over their formulas.

Read from github.com/ROCm/aiter, v0.1.7.post5 to v0.1.20.post1 (``aiter/ops/{rmsnorm,norm,activation,rope,cache}.py``
and ``csrc/kernels``): rows are found by their number, so nothing but contiguous memory is right; outputs are written,
and only the 2-D norms return theirs; rotary embeddings go by strides, and skip positions outside of the tables.
"""

# ruff: noqa: A002 - parameters have the names that the library gives them

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hal
from emulated.aiter import HALVES, of_version, require

__all__ = ["emulations"]


def emulations(version: str, library: str = "amd-aiter") -> dict[str, Callable[..., Any]]:
    """Of a version's functions."""
    return of_version(
        library,
        version,
        {
            "rmsnorm2d_fwd": _rms_norm,
            "rmsnorm2d_fwd_with_add": _rms_norm_with_add,
            "layernorm2d_fwd": _layer_norm,
            "silu_and_mul": _gate(functional.silu),
            "gelu_and_mul": _gate(functional.gelu),
            "gelu_tanh_and_mul": _gate(lambda x: functional.gelu(x, approximate="tanh")),
            "rope_cached_positions_2c_fwd_impl": _rotary,
            "reshape_and_cache": _write_vectors,
            "reshape_and_cache_flash": _write,
        },
    )


def _flat(*tensors: Tensor, dims: int = 2) -> None:
    for x in tensors:
        require(x.dtype in HALVES and x.dim() == dims and x.is_contiguous(), "rows are found by their number")
        require(x.dtype == tensors[0].dtype, "one format for all")


def _normed(wide: Tensor, weight: Tensor, epsilon: float, like: Tensor) -> Tensor:
    require(weight.dtype == like.dtype and weight.shape == wide.shape[1:], "weight is read in the format of the input")
    return functional.rms_norm(wide, wide.shape[1:], weight.float(), epsilon).to(like.dtype)


def _rms_norm(*, input: Tensor, weight: Tensor, epsilon: float, version: hal.Version) -> Tensor:
    _flat(input)
    return _normed(input.float(), weight, epsilon, input)


def _rms_norm_with_add(
    *, out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor, epsilon: float,
    version: hal.Version,
) -> None:  # fmt: skip
    _flat(out, input, residual_in, residual_out)
    places = {y.data_ptr() for y in (out, input, residual_in, residual_out)}
    require(len(places) == 4 or not out.numel(), "nothing says that any two of them may be one")
    wide = input.float() + residual_in.float()
    residual_out.copy_(wide.to(input.dtype))
    out.copy_(_normed(wide, weight, epsilon, input))


def _layer_norm(*, input: Tensor, weight: Tensor, bias: Tensor, version: hal.Version, epsilon: float = 1e-5) -> Tensor:
    _flat(input)
    require(weight.dtype == bias.dtype == input.dtype, "weight and bias are read in the format of the input")
    wide = functional.layer_norm(input.float(), input.shape[1:], weight.float(), bias.float(), epsilon)
    return wide.to(input.dtype)


def _gate(activation: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def gate(*, out: Tensor, input: Tensor, version: hal.Version) -> None:
        require(input.is_contiguous() and out.is_contiguous(), "rows are found by their number")
        require(input.numel() > 0, "a launch over nothing")
        left, right = input.float().chunk(2, -1)
        out.copy_((activation(left) * right).to(out.dtype))

    return gate


def _rotary(
    *, output_x: Tensor, output_y: Tensor, input_x: Tensor, input_y: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor, rotate_style: int, reuse_freqs_front_part: bool, nope_first: bool, version: hal.Version,
) -> None:  # fmt: skip
    require(positions.dtype == torch.int64 and positions.is_contiguous(), "positions are read as int64")
    require(positions.shape == input_x.shape[:2], "positions are [s, b]")
    require(reuse_freqs_front_part and not nope_first, "half tables, the rotated part in front")
    for table in (cos, sin):
        require(
            table.is_contiguous() and table.shape[1:3] == (1, 1) and table.dim() == 4, "tables are [max, 1, 1, half]"
        )
    half = cos.shape[-1]
    known = (positions >= 0) & (positions < len(cos))
    rows = positions.clamp(0, len(cos) - 1)
    turns = [table[rows][:, :, 0].float() for table in (cos, sin)]
    for source, target in ((input_x, output_x), (input_y, output_y)):
        require(source.stride(-1) == target.stride(-1) == 1, "the last dimension is contiguous")
        found = source.clone()
        found[..., : 2 * half] = _turned(source[..., : 2 * half].float(), *turns, rotate_style).to(source.dtype)
        target[known] = found[known]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, style: int) -> Tensor:
    if style == 0:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def _write(
    *, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str,
    k_scale: Tensor, v_scale: Tensor, version: hal.Version,
) -> None:  # fmt: skip
    tokens, heads, dim = key.shape
    require(kv_cache_dtype == "auto" and key.dtype == key_cache.dtype, "FP8 is cast without clamping")
    require(slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous(), "slots are read as int64")
    require(all(isinstance(x, Tensor) for x in (k_scale, v_scale)), "scales are read where they are given or not")
    require(key_cache.stride(0) == value_cache.stride(0), "key_cache.stride(0) == value_cache.stride(0)")
    size = key_cache.shape[1]
    for source, cache in ((key, key_cache), (value, value_cache)):
        rows = source.as_strided((tokens, heads, dim), (source.stride(0), dim, 1))
        pages = cache.as_strided((cache.shape[0], size, heads, dim), (key_cache.stride(0), heads * dim, dim, 1))
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                pages[slot // size, slot % size] = rows[token]


def _write_vectors(
    *, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str,
    version: hal.Version, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    tokens, heads, dim = key.shape
    size, x = key_cache.shape[3:]
    require(kv_cache_dtype == "auto" and key.dtype == key_cache.dtype, "FP8 is cast without clamping")
    require(slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous(), "slots are read as int64")
    rows = [source.as_strided((tokens, heads, dim), (source.stride(0), dim, 1)) for source in (key, value)]
    # Places are counted from the first element, as if nothing lay between pages.
    k_page, v_page = (heads, dim // x, size, x), (heads, dim, size)
    k_strides, v_strides = (dim * size, size * x, x, 1), (dim * size, size, 1)
    pages = len(key_cache)
    k = key_cache.as_strided((pages, *k_page), (heads * dim * size, *k_strides))
    v = value_cache.as_strided((pages, *v_page), (heads * dim * size, *v_strides))
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k[slot // size, :, :, slot % size] = rows[0][token].view(heads, dim // x, x)
            v[slot // size, :, :, slot % size] = rows[1][token]
