"""The rotary embedding of q and k and the write of k and v into a paged cache, in one Triton kernel.

What :func:`rotary_kv_cache_write` honours: ``dtype`` float32, bfloat16, float16, tables in any of these; a cache in any
of these or in one of the FP8 formats that Triton converts on the arch, with scales a tensor or a head; any heads, dims
and page size; both styles; both layouts and caches of any strides with a contiguous last dim; deterministic for slots
that differ; graph. What a position outside the tables turns becomes NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned
from hal_ops.kv_cache.triton_write import DTYPES, quantized
from hal_ops.rotary_kv_cache_write.op import RotaryKvCacheWriteRequest
from hal_ops.rows import empty_like, refuse_grad

__all__ = ["constants_of", "rotary_kv_cache_write", "rotary_write_kernel"]

_ELEMENTS = 2048


@triton.jit
def _put(values, target, offsets, mask, scale, SCALES: tl.constexpr, MOST: tl.constexpr):
    """Stores values, rounded to the target's format; quantised first if it has scales."""
    if SCALES > 0:
        values = quantized(values.to(tl.float32), scale, MOST)
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _halves(x, a_offsets, b_offsets, cos, sin, mask):
    """The two elements of each pair after the turn, in the format of x."""
    a = tl.load(x + a_offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + b_offsets, mask=mask, other=0.0).to(tl.float32)
    return (a * cos - b * sin).to(x.dtype.element_ty), (b * cos + a * sin).to(x.dtype.element_ty)


@triton.jit(
    do_not_specialize=["tokens", "max_position"],
    do_not_specialize_on_alignment=["positions", "slot_mapping", "k_scale", "v_scale"],
)
def rotary_write_kernel(
    q, k, v, q_out, k_cache, v_cache, cos, sin, positions, slot_mapping, k_scale, v_scale, tokens, max_position,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    out_token_stride, out_head_stride, cos_stride, sin_stride,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr, MOST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: ``(token blocks * (Q_HEADS + 2 * KV_HEADS),)``: a program is a head of q, k or v of ``BLOCK_T`` tokens."""
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    first = program // HEADS * BLOCK_T
    real = first + t < tokens
    begin = first.to(tl.int64)
    slots = tl.load(slot_mapping + first + t, mask=real, other=-1).to(tl.int64)
    if head >= Q_HEADS + KV_HEADS:
        head -= Q_HEADS + KV_HEADS
        d = tl.arange(0, BLOCK_V)
        mask = (slots >= 0)[:, None] & (d < V_DIM)[None, :]
        v += begin * v_token_stride + head * v_head_stride
        values = tl.load(v + (t * v_token_stride)[:, None] + d[None, :], mask=mask, other=0.0)
        scale = tl.load(v_scale + head * (SCALES - 1)) if SCALES > 0 else 1.0
        place = slots // PAGE_SIZE * v_page_stride + slots % PAGE_SIZE * v_slot_stride
        v_cache += head * v_cache_head_stride
        _put(values, v_cache, place[:, None] + d[None, :], mask, scale, SCALES, MOST)
        return
    pair = tl.arange(0, BLOCK_P)
    a = pair * 2 if INTERLEAVED else pair
    b = a + (1 if INTERLEAVED else ROTARY // 2)
    rest = ROTARY + tl.arange(0, BLOCK_REST)
    turned = (pair < ROTARY // 2)[None, :]
    position = tl.load(positions + first + t, mask=real, other=0).to(tl.int64)
    known = (real & (position >= 0) & (position < max_position))[:, None] & turned
    cos_at = position[:, None] * cos_stride + pair[None, :]
    sin_at = position[:, None] * sin_stride + pair[None, :]
    cosines = tl.load(cos + cos_at, mask=known, other=float("nan")).to(tl.float32)
    sines = tl.load(sin + sin_at, mask=known, other=float("nan")).to(tl.float32)
    if head < Q_HEADS:
        q += begin * q_token_stride + head * q_head_stride
        q_out += begin * out_token_stride + head * out_head_stride
        source = (t * q_token_stride)[:, None]
        target = (t * out_token_stride)[:, None]
        x, y = _halves(q, source + a[None, :], source + b[None, :], cosines, sines, real[:, None] & turned)
        tl.store(q_out + target + a[None, :], x, mask=real[:, None] & turned)
        tl.store(q_out + target + b[None, :], y, mask=real[:, None] & turned)
        if ROTARY < DIM:
            mask = real[:, None] & (rest < DIM)[None, :]
            tl.store(q_out + target + rest[None, :], tl.load(q + source + rest[None, :], mask=mask), mask=mask)
    else:
        head -= Q_HEADS
        used = (slots >= 0)[:, None]
        k += begin * k_token_stride + head * k_head_stride
        k_cache += head * k_cache_head_stride
        scale = tl.load(k_scale + head * (SCALES - 1)) if SCALES > 0 else 1.0
        source = (t * k_token_stride)[:, None]
        place = (slots // PAGE_SIZE * k_page_stride + slots % PAGE_SIZE * k_slot_stride)[:, None]
        x, y = _halves(k, source + a[None, :], source + b[None, :], cosines, sines, used & turned)
        _put(x, k_cache, place + a[None, :], used & turned, scale, SCALES, MOST)
        _put(y, k_cache, place + b[None, :], used & turned, scale, SCALES, MOST)
        if ROTARY < DIM:
            mask = used & (rest < DIM)[None, :]
            values = tl.load(k + source + rest[None, :], mask=mask, other=0.0)
            _put(values, k_cache, place + rest[None, :], mask, scale, SCALES, MOST)


def rotary_kv_cache_write(request: RotaryKvCacheWriteRequest, device: object) -> Callable[..., Tensor]:
    """The ``call`` phase.

    Raises:
        ValueError: a dtype or a cache format that this kernel does not do.
    """
    if request.dtype not in DTYPES or not (request.kv_dtype in DTYPES or is_fp8(request.kv_dtype)):
        raise ValueError(
            f"triton.rotary_kv_cache_write does not do dtype {request.dtype} into {request.kv_dtype}: it takes "
            f"{', '.join(DTYPES)} and FP8 caches; use hal_ops.rotary_kv_cache_write.torch_rotary_write"
        )
    return _RotaryWrite(request, gpu_of(device).device)


class _RotaryWrite:
    def __init__(self, request: RotaryKvCacheWriteRequest, device: torch.device) -> None:
        constants = constants_of(request)
        self._request = request
        self._launch = Launch(rotary_write_kernel, lambda key: constants, device, num_warps=4)
        self._block_t = constants["BLOCK_T"]
        self._heads = request.num_q_heads + 2 * request.num_kv_heads
        self._slot_dim, self._head_dim = (1, 2) if request.kv_layout == "NHD" else (2, 1)
        self._ones = torch.ones(request.num_kv_heads, device=device)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if q.requires_grad or k.requires_grad or v.requires_grad:
            refuse_grad()
        if out is None:
            out = empty_like(q)
        tokens = q.shape[0]
        if not tokens:
            return out
        k_scale, v_scale = self._ones if k_scale is None else k_scale, self._ones if v_scale is None else v_scale
        strides = [x.stride() for x in (q, k, v, out, cos, sin, k_cache, v_cache)]
        qs, ks, vs, os, cs, ss, kc, vc = strides
        key = (aligned(q, k, v, out, cos, sin, k_cache, v_cache), positions.dtype, tuple(strides))
        slot, head = self._slot_dim, self._head_dim
        self._launch(
            -(-tokens // self._block_t) * self._heads, key,
            q, k, v, out, k_cache, v_cache, cos, sin, positions, slot_mapping, k_scale, v_scale, tokens, cos.shape[0],
            qs[0], qs[1], ks[0], ks[1], vs[0], vs[1], os[0], os[1], cs[0], ss[0],
            kc[0], kc[slot], kc[head], vc[0], vc[slot], vc[head],
        )  # fmt: skip
        return out


def constants_of(request: RotaryKvCacheWriteRequest) -> dict[str, Any]:
    """The constants of the kernel, in its order."""
    block_p = triton.next_power_of_2(request.rotary_dim // 2)
    fp8 = is_fp8(request.kv_dtype)
    return {
        "Q_HEADS": request.num_q_heads,
        "KV_HEADS": request.num_kv_heads,
        "DIM": request.head_dim,
        "V_DIM": request.v_head_dim,
        "ROTARY": request.rotary_dim,
        "INTERLEAVED": request.style == "interleaved",
        "PAGE_SIZE": request.page_size,
        "SCALES": (2 if request.kv_scale == "head" else 1) if fp8 else 0,
        "MOST": torch.finfo(torch_dtype(request.kv_dtype)).max if fp8 else 0.0,
        "BLOCK_T": max(1, _ELEMENTS // (2 * block_p)),
        "BLOCK_P": block_p,
        "BLOCK_REST": triton.next_power_of_2(max(1, request.head_dim - request.rotary_dim)),
        "BLOCK_V": triton.next_power_of_2(request.v_head_dim),
    }
