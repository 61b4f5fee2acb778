"""Decode in Triton: uniform short queries over a paged cache, the keys of long rows split among programs.

What :func:`decode` honours: any heads and group sizes; head dims up to 256, equal or not (those that are no power of
two are padded in registers and shared memory, not in device memory); float16, bfloat16 and float32, over a cache of
that format or an FP8 one that Triton converts on the arch, with scales a tensor or a head; any page size and both
layouts, by strides; causal or not, windows, softcap, sinks, ALiBi, any scale; LSE; any number of queries a row, though
it is made for few: each tile of 16 to 64 pairs of a query token and a head of a group reads the keys again.

The plan holds the work items (:mod:`hal_ops.attention._decode_work`) and the memory for partial results. It uses host
lengths only. A request with ``graph=True`` gets a launch of the largest size that the plan's buffers allow, so that a
captured graph serves every step that fits them; ``update`` fills the same memory for another step.

One result is always the same bits for the same batch. With ``deterministic=True`` a row's result does not depend on the
batch that it is in either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops._triton_columns import vectors
from hal_ops.attention import masks
from hal_ops.attention._decode_work import Cut
from hal_ops.attention._split_work import Payload, SplitWork
from hal_ops.attention._triton_decode_configs import Config, config_of
from hal_ops.attention._triton_decode_kernels import decode_kernel
from hal_ops.attention.contract import PagedAttention, Step
from hal_ops.attention.reference import check_tensors
from hal_ops.attention.request import AttentionRequest
from hal_ops.kv_layout import VECTORS

__all__ = ["DTYPES", "MAX_HEAD_DIM", "decode"]

DTYPES = ("float16", "bfloat16", "float32")
"""Formats of q, of the output, and of a cache that is not FP8."""
MAX_HEAD_DIM = 256
_MERGED = 64
"""Elements of partial results that a thread of a merging program holds at a time."""


def decode(request: AttentionRequest, device: object, *, config: Config | None = None) -> PagedAttention:
    """The decode phase.

    Args:
        device: a ``hal`` device, a ``torch.device`` or its name.
        config: tile sizes, for benchmarks and tests; by default those of the table.

    Raises:
        ValueError: a dtype, a cache format, a head dim or an option that this kernel does not do.
    """
    _check(request)
    return _Decode(request, device, config)


def _check(request: AttentionRequest) -> None:
    wrong = [
        f"{name} {getattr(request, name)}"
        for name, ok in (
            ("dtype", request.dtype in DTYPES),
            ("kv_dtype", request.kv_dtype == request.dtype or is_fp8(request.kv_dtype)),
            ("head_dim", request.head_dim <= MAX_HEAD_DIM),
            ("v_head_dim", request.v_head_dim <= MAX_HEAD_DIM),
            ("needs_grad", not request.needs_grad),
        )
        if not ok
    ]
    if wrong:
        raise ValueError(
            f"triton.decode does not do {', '.join(wrong)}: it takes {', '.join(DTYPES)}, a cache of the same format "
            f"or an FP8 one, and head dims up to {MAX_HEAD_DIM}; use hal_ops.attention.reference, which does everything"
        )


class _Decode(SplitWork):
    def __init__(self, request: AttentionRequest, device: object, config: Config | None) -> None:
        self.request = request
        self.gpu = gpu_of(device)
        self.graph = request.graph
        self.width = request.v_head_dim
        rows = request.max_q_len * request.group_size
        dims = _power_of_two(request.head_dim) + _power_of_two(request.v_head_dim)
        item = torch_dtype(request.kv_dtype).itemsize
        self.config = config or config_of(self.gpu.arch, rows, dims, item)
        self.block_m = min(max(16, _power_of_two(rows)), self.config.rows)
        self.tiles = -(-rows // self.block_m)
        self.rows = min(rows, self.block_m)
        self.cut = Cut(
            programs=request.num_kv_heads * self.tiles,
            target=int(self.gpu.multiprocessors * self.config.fill),
            slots=self.gpu.multiprocessors * self.config.resident,
            block=self.config.block,
            left=masks.sides(request.causal, request.window)[0],
            fixed=request.deterministic,
            tokens=request.max_q_len,
        )
        self._launch = Launch(
            decode_kernel, self._constants, self.gpu.device, num_warps=self.config.warps, num_stages=2
        )
        self._cap = request.softcap or 1.0
        self._scale = request.softmax_scale
        self._slot_dim, self._head_dim = {"NHD": (1, 2), "HND": (2, 1), "HDN": (3, 1)}[request.kv_layout]
        self._out_shape = (request.num_q_heads, request.v_head_dim)
        self._ones = torch.ones(request.num_kv_heads, device=self.gpu.device)

    def _constants(self, key: Key) -> dict[str, Any]:
        return constants_of(self.request, self.config, self.block_m, self.gpu.arch, key)

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Payload,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        tokens = q.shape[0]
        out = q.new_empty((tokens, *self._out_shape))
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else payload.lse
        if payload.programs:
            self._run(q, k_cache, v_cache, step, payload, out, lse, sinks, alibi_slopes, k_scale, v_scale, return_lse)
        return (out, lse) if return_lse else out

    def _run(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Payload,
        out: Tensor,
        lse: Tensor,
        sinks: Tensor | None,
        slopes: Tensor | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> None:
        q_strides, k_strides, v_strides = q.stride(), k_cache.stride(), v_cache.stride()
        aligned = (q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) & 15 == 0
        slot, head, one = self._slot_dim, self._head_dim, self._ones
        self._launch(
            payload.programs,
            (return_lse, aligned, q_strides, k_strides, v_strides),
            q, k_cache, v_cache, out, lse, payload.work, step.block_table, payload.out, payload.lse, payload.counters,
            one if sinks is None else sinks,
            one if slopes is None else slopes,
            one if k_scale is None else k_scale,
            one if v_scale is None else v_scale,
            q.shape[0], self._scale, self._cap, q_strides[0], q_strides[1],
            k_strides[0], k_strides[slot], k_strides[head], v_strides[0], v_strides[slot], v_strides[head],
            step.block_table.stride(0),
        )  # fmt: skip


Key = tuple[bool, bool, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Whether the LSE is returned, whether addresses are aligned, and the strides of q, of the keys and of the values."""


def constants_of(request: AttentionRequest, config: Config, block_m: int, arch: str, key: Key) -> dict[str, Any]:
    """The constants of the kernel, in its order."""
    return_lse, _, _, k_strides, v_strides = key
    left, right = masks.sides(request.causal, request.window)
    rows = request.max_q_len * request.group_size
    tiles = -(-rows // block_m)
    block_r = _power_of_two(min(rows, block_m))
    fp8 = is_fp8(request.kv_dtype)
    block_dv = max(32 if fp8 else 16, _power_of_two(request.v_head_dim))
    return {
        "KV_HEADS": request.num_kv_heads,
        "GROUP": request.group_size,
        "TILES": tiles,
        "ROWS": min(rows, block_m),
        "DIM": request.head_dim,
        "V_DIM": request.v_head_dim,
        "PAGE_SIZE": int(request.page_size),
        "LEFT": -1 if left is None else left,
        # A single query that is the last token sees no key to its right that there could be.
        "RIGHT": -1 if right is None or request.max_q_len == 1 else right,
        "SOFTCAP": request.softcap > 0,
        "SINKS": request.sinks,
        "ALIBI": request.alibi,
        "SCALES": (2 if request.kv_scale == "head" else 1) if fp8 else 0,
        "FP8": fp8 and request.dtype != "float32",
        "LSE": return_lse,
        "PRECISION": "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": config.block,
        "BLOCK_D": max(16, _power_of_two(request.head_dim)),
        "BLOCK_DV": block_dv,
        "BLOCK_R": block_r,
        "AT_ONCE": max(2, min(16, _MERGED * 32 * config.warps // (block_r * block_dv))),
        "STAGES": config.stages,
        "SAME": k_strides == v_strides,
        "PAIRS": _pairs(request, arch, v_strides),
        **vectors(request.kv_layout, request.kv_dtype),
    }


def _pairs(request: AttentionRequest, arch: str, v_strides: tuple[int, ...]) -> str:
    """What PTX calls pairs of the cache's format, where it converts them to float16 (PTX ISA 8.1, ``cvt``: sm_89)."""
    converts = (
        request.kv_layout != VECTORS and arch.startswith("sm_") and int(arch[3:]) >= 89 and request.dtype != "float32"
    )
    if not converts or request.v_head_dim % 2 or any(stride % 2 for stride in v_strides[:3]):
        return ""
    return {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}.get(request.kv_dtype, "")


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
