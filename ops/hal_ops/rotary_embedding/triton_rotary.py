"""The rotary embedding of q and k in one Triton kernel.

What :func:`rotary_embedding` honours: ``dtype`` float32, bfloat16, float16; tables in any of these; any heads, head dim
and rotary dim; both styles; deterministic; graph. It has no backward. A position outside the tables reads nothing, and
gives NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_rows import aligned, block_size, row_start
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.reference import Pair, outputs
from hal_ops.rows import fold, refuse_grad

__all__ = ["CONFIGS", "RotaryConfig", "rotary_embedding", "rotate_heads"]


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Elements a program turns, of heads of one token, and its warps."""

    elements: int
    warps: int


CONFIGS = {"neox": RotaryConfig(1024, 2), "interleaved": RotaryConfig(1024, 2)}
"""By style, for every arch; measured on an H200 (sm_90): ``benchmarks/tune_ops.py``."""


@triton.jit
def _turn(
    x, out, first_head, cos, sin, x_stride, out_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, NEOX: tl.constexpr, COPY: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. ``x`` and ``out`` point at the token; ``cos`` and ``sin`` are ``[1, HALF]``."""
    head = first_head + tl.arange(0, HEADS)[:, None]
    x += head.to(tl.int64) * x_stride
    out += head.to(tl.int64) * out_stride
    if NEOX:
        column = tl.arange(0, HALF)[None, :]
        inside = (head < NUM_HEADS) & (column < ROTARY_DIM // 2)
        a = tl.load(x + column, inside, 0.0).to(tl.float32)
        b = tl.load(x + ROTARY_DIM // 2 + column, inside, 0.0).to(tl.float32)
        tl.store(out + column, (a * cos - b * sin).to(out.dtype.element_ty), inside)
        tl.store(out + ROTARY_DIM // 2 + column, (b * cos + a * sin).to(out.dtype.element_ty), inside)
    else:
        column = tl.arange(0, 2 * HALF)[None, :]
        inside = (head < NUM_HEADS) & (column < ROTARY_DIM)
        both = tl.load(x + column, inside, 0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (HEADS, HALF, 2)))
        both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (HEADS, 2 * HALF))
        tl.store(out + column, both.to(out.dtype.element_ty), inside)
    if COPY:
        column = ROTARY_DIM + tl.arange(0, REST)[None, :]
        inside = (head < NUM_HEADS) & (column < HEAD_DIM)
        tl.store(out + column, tl.load(x + column, inside), inside)


@triton.jit(do_not_specialize=["max_position", "q_inner", "k_inner", "q_out_inner", "k_out_inner"])
def rotate_heads(
    q, k, cos, sin, positions, q_out, k_out, max_position, cos_stride, sin_stride,
    q_inner, q_outer_stride, q_inner_stride, q_head_stride, k_inner, k_outer_stride, k_inner_stride, k_head_stride,
    q_out_inner, q_out_outer_stride, q_out_inner_stride, q_out_head_stride,
    k_out_inner, k_out_outer_stride, k_out_inner_stride, k_out_head_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """``HEADS`` heads of one token a program; those of k come after those of q."""
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    blocks: tl.constexpr = q_blocks + (K_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    column = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + token + tl.zeros((1, 1), tl.int32)).to(tl.int64)
    known = (column < ROTARY_DIM // 2) & (position >= 0) & (position < max_position)
    c = tl.load(cos + position * cos_stride + column, known, float("nan")).to(tl.float32)
    s = tl.load(sin + position * sin_stride + column, known, float("nan")).to(tl.float32)
    if block < q_blocks:
        q += row_start(token, q_inner, q_outer_stride, q_inner_stride)
        q_out += row_start(token, q_out_inner, q_out_outer_stride, q_out_inner_stride)
        _turn(
            q, q_out, block * HEADS, c, s, q_head_stride, q_out_head_stride,
            Q_HEADS, HEAD_DIM, ROTARY_DIM, NEOX, COPY, HEADS, HALF, REST,
        )  # fmt: skip
    else:
        k += row_start(token, k_inner, k_outer_stride, k_inner_stride)
        k_out += row_start(token, k_out_inner, k_out_outer_stride, k_out_inner_stride)
        _turn(
            k, k_out, (block - q_blocks) * HEADS, c, s, k_head_stride, k_out_head_stride,
            K_HEADS, HEAD_DIM, ROTARY_DIM, NEOX, COPY, HEADS, HALF, REST,
        )  # fmt: skip


def rotary_embedding(
    request: RotaryEmbeddingRequest, device: object, *, config: RotaryConfig | None = None
) -> Callable[..., Pair]:
    """The ``call`` phase. ``config`` replaces the table's."""
    rotate = _RotateHeads(request, gpu_of(device).device, config or CONFIGS[request.style])
    empty = outputs(request)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, out: Pair | None = None) -> Pair:
        if q.requires_grad or k.requires_grad or cos.requires_grad or sin.requires_grad:
            refuse_grad()
        if out is None:
            out = empty(q, k, cos, sin, positions)
        if positions.numel():
            rotate(q, k, cos, sin, positions, out)
        return out

    return call


class _RotateHeads:
    """The kernel on one device. Its key begins with whether what does not turn is copied."""

    def __init__(self, request: RotaryEmbeddingRequest, device: torch.device, config: RotaryConfig) -> None:
        half, rest = block_size(request.rotary_dim // 2), request.head_dim - request.rotary_dim
        most_heads = block_size(max(request.num_q_heads, request.num_kv_heads))
        heads = min(max(config.elements // (2 * half), 1), most_heads)
        constants = {
            "Q_HEADS": request.num_q_heads,
            "K_HEADS": request.num_kv_heads,
            "HEAD_DIM": request.head_dim,
            "ROTARY_DIM": request.rotary_dim,
            "NEOX": request.style == "neox",
            "HEADS": heads,
            "HALF": half,
            "REST": block_size(rest),
        }
        self._launch = Launch(rotate_heads, lambda key: {**constants, "COPY": key[0]}, device, num_warps=config.warps)
        self._blocks = -(-request.num_q_heads // heads) - (-request.num_kv_heads // heads)
        self._rest = rest > 0

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, out: Pair) -> None:
        tensors = {"q": q, "k": k, "out[0]": out[0], "out[1]": out[1]}
        places = [(*fold(x, kept=2, name=name)[1:], x.stride(-2)) for name, x in tensors.items()]
        copy = self._rest and not (_same(q, out[0]) and _same(k, out[1]))
        key = (
            copy,
            aligned(q, k, cos, sin, positions, *out),
            positions.dtype,
            cos.stride(0),
            sin.stride(0),
            *(place[1:] for place in places),
        )
        self._launch(
            positions.numel() * self._blocks, key, q, k, cos, sin, positions, *out,
            cos.shape[0], cos.stride(0), sin.stride(0), *(number for place in places for number in place),
        )  # fmt: skip


def _same(x: Tensor, out: Tensor) -> bool:
    return x is out or (x.data_ptr() == out.data_ptr() and x.stride() == out.stride())
