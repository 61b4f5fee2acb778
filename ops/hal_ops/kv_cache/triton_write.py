"""Writing keys and values into a paged cache with Triton, and the same with the rotary embedding in one pass.

:func:`write` honours: any heads and head dims; float16, bfloat16 and float32 into a cache of any of these, or into one
of the FP8 formats that Triton converts on the arch, with scales a tensor or a head; any page size; all layouts and
caches of any strides with a contiguous last dim; deterministic for slots that differ; graphs.
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
from hal_ops._triton_columns import columns_at, vectors
from hal_ops.kv_cache.op import KvCacheWriteRequest

__all__ = ["DTYPES", "write", "write_kernel"]

DTYPES = ("float16", "bfloat16", "float32")
"""Formats of k and v, and of a cache that is not FP8."""
_ELEMENTS = 4096
_COLUMNS = 1024


@triton.jit
def quantized(x, scale, MOST: tl.constexpr):
    """float32 ``x / scale``, clamped to the format's largest value; NaN stays NaN."""
    return tl.clamp(x * tl.div_rn(1.0, scale), -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _copy_columns(
    x, cache, scale, first, block, slots, real, token_stride, head_stride, page_stride, slot_stride,
    cache_head_stride, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr,
    MOST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Columns ``[block * BLOCK_C, ...)`` of the flattened heads of ``BLOCK_T`` tokens.

    Heads may lie outermost, so what a head or a token is multiplied with may pass 32 bits.
    """
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    head = (c // DIM).to(tl.int64)
    d = c % DIM
    # Skipped tokens are loaded too: so the loads need not wait for the slots.
    mask = real[:, None] & (c < HEADS * DIM)[None, :]
    x += first.to(tl.int64) * token_stride
    values = tl.load(x + (t * token_stride)[:, None] + (head * head_stride + d)[None, :], mask=mask, other=0.0)
    if SCALES > 0:
        by = tl.load(scale + head * (SCALES - 1), mask=c < HEADS * DIM, other=1.0)
        values = quantized(values.to(tl.float32), by[None, :], MOST)
    page = slots // PAGE_SIZE
    place = page * page_stride + (slots % PAGE_SIZE) * slot_stride
    target = cache + place[:, None] + (head * cache_head_stride + columns_at(d, PAGE_SIZE, VECTOR))[None, :]
    tl.store(target, values.to(cache.dtype.element_ty), mask=mask & (slots >= 0)[:, None])


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slot_mapping", "k_scale", "v_scale"])
def write_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, tokens,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr,
    MOST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, K_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr,
):  # fmt: skip
    """Grid: ``(token blocks * BLOCKS,)``; of a token block's programs the first ``K_BLOCKS`` write keys."""
    program = tl.program_id(0)
    first = program // BLOCKS * BLOCK_T
    block = program % BLOCKS
    token = first + tl.arange(0, BLOCK_T)
    real = token < tokens
    slots = tl.load(slot_mapping + token, mask=real, other=-1).to(tl.int64)
    if block < K_BLOCKS:
        _copy_columns(
            k, k_cache, k_scale, first, block, slots, real, k_token_stride, k_head_stride,
            k_page_stride, k_slot_stride, k_cache_head_stride, HEADS, DIM, PAGE_SIZE, SCALES, MOST, BLOCK_T, BLOCK_C,
            K_VECTOR,
        )  # fmt: skip
    else:
        _copy_columns(
            v, v_cache, v_scale, first, block - K_BLOCKS, slots, real, v_token_stride, v_head_stride,
            v_page_stride, v_slot_stride, v_cache_head_stride, HEADS, V_DIM, PAGE_SIZE, SCALES, MOST, BLOCK_T, BLOCK_C,
            V_VECTOR,
        )  # fmt: skip


def write(request: KvCacheWriteRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase.

    Raises:
        ValueError: a dtype that is not in ``DTYPES``, or a ``kv_dtype`` that is neither in it nor FP8.
    """
    if request.dtype not in DTYPES or not (request.kv_dtype in DTYPES or is_fp8(request.kv_dtype)):
        raise ValueError(
            f"triton.kv_cache_write does not do dtype {request.dtype} into {request.kv_dtype}: it takes "
            f"{', '.join(DTYPES)} and FP8 caches; use hal_ops.kv_cache.torch_write"
        )
    return _Write(request, gpu_of(device).device)


class _Write:
    def __init__(self, request: KvCacheWriteRequest, device: torch.device) -> None:
        constants = constants_of(request)
        self._launch = Launch(write_kernel, lambda key: constants, device, num_warps=4)
        self._block_t, self._blocks = constants["BLOCK_T"], constants["BLOCKS"]
        self._slot_dim, self._head_dim = {"NHD": (1, 2), "HND": (2, 1), "HDN": (3, 1)}[request.kv_layout]
        self._ones = torch.ones(request.num_kv_heads, device=device)

    def __call__(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        # A plan of maximum size has more slots than a smaller step has tokens.
        tokens = min(k.shape[0], slot_mapping.shape[0])
        if not tokens:
            return
        k_scale, v_scale = self._ones if k_scale is None else k_scale, self._ones if v_scale is None else v_scale
        strides = k.stride(), v.stride(), k_cache.stride(), v_cache.stride()
        ks, vs, kc, vc = strides
        aligned = (k.data_ptr() | v.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) & 15 == 0
        slot, head = self._slot_dim, self._head_dim
        self._launch(
            -(-tokens // self._block_t) * self._blocks,
            (aligned, strides),
            k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, tokens, ks[0], ks[1], vs[0], vs[1],
            kc[0], kc[slot], kc[head], vc[0], vc[slot], vc[head],
        )  # fmt: skip


def constants_of(request: KvCacheWriteRequest) -> dict[str, Any]:
    """The constants of the kernel, in its order."""
    widths = [request.num_kv_heads * dim for dim in (request.head_dim, request.v_head_dim)]
    block_c = min(_COLUMNS, triton.next_power_of_2(max(widths)))
    k_blocks, v_blocks = (-(-width // block_c) for width in widths)
    fp8 = is_fp8(request.kv_dtype)
    return {
        "HEADS": request.num_kv_heads,
        "DIM": request.head_dim,
        "V_DIM": request.v_head_dim,
        "PAGE_SIZE": request.page_size,
        "SCALES": (2 if request.kv_scale == "head" else 1) if fp8 else 0,
        "MOST": torch.finfo(torch_dtype(request.kv_dtype)).max if fp8 else 0.0,
        "BLOCK_T": max(1, _ELEMENTS // block_c),
        "BLOCK_C": block_c,
        "K_BLOCKS": k_blocks,
        "BLOCKS": k_blocks + v_blocks,
        **vectors(request.kv_layout, request.kv_dtype),
    }
