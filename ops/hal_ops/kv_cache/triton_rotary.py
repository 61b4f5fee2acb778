"""Rotary embedding of q and k and the write of k and v into a paged cache, in one pass over this step's tensors.

The same as :mod:`hal_ops.rotary_embedding` followed by :mod:`hal_ops.kv_cache.triton_write`: keys are rounded to their
own format before they are rounded to the cache's.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import dtype_name, is_fp8
from hal_ops.kv_cache.triton_write import quantized

__all__ = ["rotary_and_write", "rotary_write_kernel"]

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


@triton.jit(do_not_specialize=["tokens"])
def rotary_write_kernel(
    q, k, v, q_out, k_cache, v_cache, cos, sin, positions, slot_mapping, k_scale, v_scale, tokens,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    out_token_stride, out_head_stride, table_stride,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr, MOST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid: ``(token blocks * (Q_HEADS + 2 * KV_HEADS),)``: a program is a head of q, k or v of ``BLOCK_T`` tokens."""
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    program = tl.program_id(0)
    head = program % HEADS
    t = tl.arange(0, BLOCK_T)
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
    angle = position[:, None] * table_stride + pair[None, :]
    cosines = tl.load(cos + angle, mask=real[:, None] & turned, other=0.0).to(tl.float32)
    sines = tl.load(sin + angle, mask=real[:, None] & turned, other=0.0).to(tl.float32)
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


def rotary_and_write(
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
    kv_layout: str = "NHD",
    style: str = "neox",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Turn q and k by their positions; write the turned k, and v, to their slots.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``. k: the same with ``num_kv_heads``, v with ``v_head_dim`` too; the last
            dim is contiguous, the others may be views of a fused projection.
        cos, sin: ``[max_position, rotary_dim / 2]``; elements from ``rotary_dim`` on are not turned.
        positions: int32 or int64 ``[tokens]``, inside the tables.
        k_cache, v_cache, slot_mapping, k_scale, v_scale: as :mod:`hal_ops.kv_cache.op` says; changed in place. A token
            whose slot is negative is not written, but its q is turned.
        style: ``"neox"`` or ``"interleaved"``, see :mod:`hal_ops.rotary_embedding.op`.
        out: where the turned q goes; ``q`` itself works in place. Without it: a new tensor.

    Returns:
        The turned q. k and v stay as they are.

    Raises:
        ValueError: an unknown style or layout, or tensors or scales of different lengths.
    """
    if style not in ("neox", "interleaved") or kv_layout not in ("NHD", "HND"):
        raise ValueError(f"style={style!r}, kv_layout={kv_layout!r}: choose 'neox' or 'interleaved', 'NHD' or 'HND'")
    lengths = {len(x) for x in (q, k, v, positions, slot_mapping)}
    if len(lengths) != 1:
        raise ValueError(f"q, k, v, positions and slot_mapping have {sorted(lengths)} tokens: give equally many")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if not len(q):
        return out
    if is_fp8(dtype_name(k_cache.dtype)) and (k_scale is None or v_scale is None):
        one = torch.ones(1 if k_scale is v_scale else k.shape[1], dtype=torch.float32, device=q.device)
        k_scale, v_scale = one if k_scale is None else k_scale, one if v_scale is None else v_scale
    if k_scale is not None and v_scale is not None and k_scale.numel() != v_scale.numel():
        raise ValueError(f"{k_scale.numel()} scales for k, {v_scale.numel()} for v: give one each, or one a head each")
    constants = _constants(q, k, v, cos, k_cache, kv_layout, style, k_scale)
    slot, head = (1, 2) if kv_layout == "NHD" else (2, 1)
    kc, vc = k_cache.stride(), v_cache.stride()
    programs = -(-len(q) // constants["BLOCK_T"]) * (q.shape[1] + 2 * k.shape[1])
    rotary_write_kernel[(programs,)](
        q, k, v, out, k_cache, v_cache, cos, sin, positions, slot_mapping,
        cos if k_scale is None else k_scale, cos if v_scale is None else v_scale, len(q),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        cos.stride(0), kc[0], kc[slot], kc[head], vc[0], vc[slot], vc[head], **constants, num_warps=4,
    )  # fmt: skip
    return out


def _constants(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, k_cache: Tensor, kv_layout: str, style: str, k_scale: Tensor | None
) -> dict[str, Any]:
    dim, rotary = q.shape[2], 2 * cos.shape[1]
    block_p = triton.next_power_of_2(rotary // 2)
    fp8 = is_fp8(dtype_name(k_cache.dtype))
    return {
        "Q_HEADS": q.shape[1],
        "KV_HEADS": k.shape[1],
        "DIM": dim,
        "V_DIM": v.shape[2],
        "ROTARY": rotary,
        "INTERLEAVED": style == "interleaved",
        "PAGE_SIZE": k_cache.shape[1 if kv_layout == "NHD" else 2],
        "SCALES": 0 if k_scale is None or not fp8 else (2 if k_scale.numel() > 1 else 1),
        "MOST": torch.finfo(k_cache.dtype).max if fp8 else 0.0,
        "BLOCK_T": max(1, _ELEMENTS // (2 * block_p)),
        "BLOCK_P": block_p,
        "BLOCK_REST": triton.next_power_of_2(max(1, dim - rotary)),
        "BLOCK_V": triton.next_power_of_2(v.shape[2]),
    }
