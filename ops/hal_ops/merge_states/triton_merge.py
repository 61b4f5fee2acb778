"""The merge of attention states with Triton.

Honours any heads and any ``v_head_dim``; float16, bfloat16 and float32; deterministic; graphs. Outs and lses that are
not contiguous are copied.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops.merge_states.op import MergeStatesRequest
from hal_ops.merge_states.reference import Merge

__all__ = ["DTYPES", "merge", "merge_kernel"]

DTYPES = ("float16", "bfloat16", "float32")
"""Formats of the outs."""
_ELEMENTS = 2048


@triton.jit
def _part(out, at, d, weight, some, mask):
    """A state's weighted share; zeros where it saw no key, whatever its out holds there."""
    mask = mask & some[:, None]
    values = tl.load(out + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return values * weight[:, None]


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, rows,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: ``(row blocks,)``; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < rows
    d = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (d < DIM)[None, :]
    a = tl.load(lse_a + row, mask=real, other=float("-inf"))
    b = tl.load(lse_b + row, mask=real, other=float("-inf"))
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(a - base)
    weight_b = tl.exp(b - base)
    total = weight_a + weight_b
    safe = tl.where(total > 0, total, 1.0)
    merged = _part(out_a, row * DIM, d, weight_a / safe, a > float("-inf"), mask)
    merged += _part(out_b, row * DIM, d, weight_b / safe, b > float("-inf"), mask)
    tl.store(out + row[:, None] * DIM + d[None, :], merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, top + tl.log(total), mask=real)


def merge(request: MergeStatesRequest, device: object) -> Merge:
    """The ``call`` phase.

    Raises:
        ValueError: a dtype that is not in ``DTYPES``.
    """
    if request.dtype not in DTYPES:
        raise ValueError(f"triton.merge_attention_states does {', '.join(DTYPES)}, not {request.dtype}")
    block_d = triton.next_power_of_2(request.v_head_dim)
    block_r = max(1, _ELEMENTS // block_d)
    constants = {"DIM": request.v_head_dim, "BLOCK_R": block_r, "BLOCK_D": block_d}
    launch = Launch(merge_kernel, lambda key: constants, gpu_of(device).device, num_warps=4)

    def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        parts = out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous()
        out = torch.empty_like(parts[0])
        lse = torch.empty_like(parts[1])
        rows = lse.numel()
        if rows:
            aligned = 0
            for part in parts:
                aligned |= part.data_ptr()
            launch(-(-rows // block_r), aligned & 15 == 0, *parts, out, lse, rows)
        return out, lse

    return call
