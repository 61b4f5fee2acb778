"""The gather of rows out of a paged cache in Triton.

What :func:`kv_pages_gather` honours: ``dtype`` float32, bfloat16, float16; a cache in any of these or in one of the FP8
formats that Triton converts on the arch, with scales a tensor or a head; any heads, dims and page size; both layouts and
caches of any strides with a contiguous last dim; deterministic; graph.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import is_fp8
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned
from hal_ops.kv_cache.triton_write import DTYPES
from hal_ops.kv_pages_gather.op import KvPagesGatherRequest
from hal_ops.kv_pages_gather.reference import Pair, outputs

__all__ = ["constants_of", "gather_kernel", "kv_pages_gather"]

_GATHERED = 2048


@triton.jit(
    do_not_specialize=["row_programs", "table_stride"], do_not_specialize_on_alignment=["table", "lengths", "scale"]
)
def gather_kernel(
    cache, out, table, lengths, scale, row_programs, table_stride, page_stride, slot_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: ``(rows * row_programs,)``, of which a row has a block of tokens times ``BLOCKS``; lengths are cumulative."""
    row = tl.program_id(0) // row_programs
    begin = tl.load(lengths + row)
    length = tl.load(lengths + row + 1) - begin
    program = tl.program_id(0) % row_programs
    token = program // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    if program // BLOCKS * BLOCK_T >= length:
        return
    inside = token < length
    page = tl.load(table + row.to(tl.int64) * table_stride + token // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (c < HEADS * DIM)[None, :]
    place = page * page_stride + (token % PAGE_SIZE).to(tl.int64) * slot_stride
    columns = (c // DIM).to(tl.int64) * head_stride + c % DIM
    values = tl.load(cache + place[:, None] + columns[None, :], mask=mask, other=0.0)
    if SCALES > 0:
        by = tl.load(scale + c // DIM * (SCALES - 1), mask=c < HEADS * DIM, other=0.0)
        values = values.to(tl.float32) * by[None, :]
    out += begin.to(tl.int64) * (HEADS * DIM)
    tl.store(out + token.to(tl.int64)[:, None] * (HEADS * DIM) + c[None, :], values.to(out.dtype.element_ty), mask=mask)


def kv_pages_gather(request: KvPagesGatherRequest, device: object) -> Callable[..., Pair]:
    """The ``call`` phase.

    Raises:
        ValueError: a dtype or a cache format that this kernel does not do.
    """
    if request.dtype not in DTYPES or not (request.kv_dtype in DTYPES or is_fp8(request.kv_dtype)):
        raise ValueError(
            f"triton.kv_pages_gather does not do {request.kv_dtype} into {request.dtype}: it takes {', '.join(DTYPES)} "
            "and FP8 caches; use hal_ops.kv_pages_gather.torch_gather"
        )
    where, empty = gpu_of(device).device, outputs(request)
    gathers = [_Gather(request, dim, where) for dim in (request.head_dim, request.v_head_dim)]

    def call(
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cu_seqlens: Tensor,
        total: int,
        longest: int,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Pair | None = None,
    ) -> Pair:
        if out is None:
            out = empty(k_cache, v_cache, block_table, cu_seqlens, total, longest)
        if total:
            for gather, cache, scale, x in zip(gathers, (k_cache, v_cache), (k_scale, v_scale), out, strict=True):
                gather(cache, block_table, cu_seqlens, longest, scale, x)
        return out

    return call


class _Gather:
    """The gather of keys, or of values."""

    def __init__(self, request: KvPagesGatherRequest, dim: int, device: torch.device) -> None:
        constants = constants_of(request, dim)
        self._block_t, self._blocks = constants["BLOCK_T"], constants["BLOCKS"]
        self._launch = Launch(gather_kernel, lambda key: constants, device, num_warps=4)
        self._slot_dim, self._head_dim = (1, 2) if request.kv_layout == "NHD" else (2, 1)
        self._ones = torch.ones(request.num_kv_heads, device=device)

    def __call__(
        self, cache: Tensor, table: Tensor, lengths: Tensor, longest: int, scale: Tensor | None, out: Tensor
    ) -> None:
        strides = cache.stride()
        row_programs = -(-longest // self._block_t) * self._blocks
        self._launch(
            table.shape[0] * row_programs, (aligned(cache, out), strides),
            cache, out, table, lengths, self._ones if scale is None else scale, row_programs, table.stride(0),
            strides[0], strides[self._slot_dim], strides[self._head_dim],
        )  # fmt: skip


def constants_of(request: KvPagesGatherRequest, dim: int) -> dict[str, Any]:
    """The constants of the kernel, in its order."""
    width = request.num_kv_heads * dim
    block_c = min(1024, triton.next_power_of_2(width))
    return {
        "HEADS": request.num_kv_heads,
        "DIM": dim,
        "PAGE_SIZE": request.page_size,
        "SCALES": (2 if request.kv_scale == "head" else 1) if is_fp8(request.kv_dtype) else 0,
        "BLOCK_T": max(1, _GATHERED // block_c),
        "BLOCK_C": block_c,
        "BLOCKS": -(-width // block_c),
    }
