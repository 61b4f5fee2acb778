"""Extend in Triton: ragged queries over a paged cache.

What :func:`extend` honours: all that :mod:`hal_ops.attention.triton_prefill` does, over a cache of q's format or an FP8
one that Triton converts on the arch, with scales a tensor or a head; any page size and all layouts, by strides. No page
that no query sees is read, and no entry of the block table past a row's last page; slots that no query sees count for
nothing, whatever is in them.

The plan lists a step's tiles, longest first, from host lengths alone. On sm_90 the kernel of
:mod:`hal_ops.attention.triton_hopper` is launched where the page size is a multiple of 16 and the cache is not HDN;
over an FP8 one for heads of 64 and of 128.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import is_fp8
from hal_ops._gpu import gpu_of
from hal_ops._triton_columns import vectors
from hal_ops.attention import masks
from hal_ops.attention._triton_configs import (
    Config,
    Hopper,
    config_of,
    hopper_of,
    in_boxes,
    padded_on,
    rounds_queries,
)
from hal_ops.attention._triton_features import Features, check
from hal_ops.attention._triton_place import place_tile
from hal_ops.attention._triton_way import Way, gluon_works, key_of, known_turns, no_boxes
from hal_ops.attention.contract import PagedAttention, Step
from hal_ops.attention.reference import check_tensors
from hal_ops.attention.request import AttentionRequest
from hal_ops.attention.triton_common import tile
from hal_ops.attention.triton_limits import heads
from hal_ops.kv_layout import VECTORS, by_token
from hal_ops.uploads import staged

__all__ = ["extend", "extend_kernel"]

_LONG = 24
"""Most blocks of keys in a tile, on average, for programs of several tiles: on an H200 programs of one took 1.06 of their
time with 10 blocks (16 prompts of 129 to 4083 tokens), 0.96 with 36 and with 68, and 0.90 where rows of 4k to 32k keys are
mixed. Over an FP8 cache there is no bound: what is converted for the next tile is, while one ends."""


@triton.jit(
    do_not_specialize=["left", "right", "table_stride"],
    do_not_specialize_on_alignment=["sinks", "slopes", "k_scale", "v_scale", "tiles", "cu_q", "kv_lens", "table"],
)
def extend_kernel(
    q, k, v, out, lse, sinks, slopes, k_scale, v_scale, tiles, cu_q, kv_lens, table, left, right, scale, cap,
    q_stride, q_head_stride, k_page_stride, k_stride, k_head_stride, v_page_stride, v_stride, v_head_stride,
    out_stride, out_head_stride, table_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr, CUT: tl.constexpr, REST: tl.constexpr,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, PLAIN: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, K_VECTOR: tl.constexpr, V_VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile: ``tiles`` int32 ``[tiles, 2]`` holds its row of the step and its first token there; row -1 is none.

    ``K_SCALES``, ``V_SCALES``: scales of the cache there are: 0, 1, or one a kv head.
    """
    row, head, token, q_start, q_len, kv_len = place_tile(tl.program_id(0), tiles, cu_q, kv_lens, HEADS // PACK, PACK)
    if row < 0:
        return
    kv_head = head // GROUP
    q += (q_start + token).to(tl.int64) * q_stride + head.to(tl.int64) * q_head_stride
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    table += row.to(tl.int64) * table_stride
    out += (q_start + token).to(tl.int64) * out_stride + head * out_head_stride
    lse += (q_start + token).to(tl.int64) * HEADS + head
    if K_SCALES > 0:
        scale *= tl.load(k_scale + (kv_head if K_SCALES > 1 else 0))
    factor = 1.0
    if V_SCALES > 0:
        factor = tl.load(v_scale + (kv_head if V_SCALES > 1 else 0))
    tile(
        q, k, v, table, out, lse, sinks, slopes, head, token, q_len, kv_len, left, right, scale, cap, factor,
        q_stride, q_head_stride, k_page_stride, k_stride, v_page_stride, v_stride, out_stride, out_head_stride,
        HEADS, PACK, PAGE_SIZE, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_M, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PRECISION, K_VECTOR, V_VECTOR,
    )  # fmt: skip


def extend(request: AttentionRequest, device: object, *, configs: tuple[Config | Hopper, ...] = ()) -> PagedAttention:
    """The extend phase.

    Args:
        device: a ``hal`` device, a ``torch.device`` or its name.
        configs: tile sizes, for benchmarks and tests; the first whose kernel can run is taken. By default the table's.

    Raises:
        ValueError: a dtype, a cache format, a head dim or an option that this kernel does not do.
    """
    check(request, "extend")
    return _Extend(request, device, configs)


@dataclasses.dataclass(slots=True)
class Tiles:
    """The plan of a step.

    Fields:
        block_m: rows of a tile. tokens: query tokens of a tile.
        table: int32 ``[tiles, 2]`` on the device: row of the step and first token; row -1 is none.
        padded: whether q may hold tokens of no row; their result is 0.
        loop: whether programs of the kernel for Hopper make several tiles.
    """

    block_m: int
    tokens: int
    table: Tensor
    padded: bool
    loop: bool


class _Extend:
    def __init__(self, request: AttentionRequest, device: object, configs: tuple[Config | Hopper, ...]) -> None:
        self.request = request
        self.gpu = gpu_of(device)
        real = self.gpu.device.type != "cpu"
        refused = heads(request, cached=True) if real else ""
        if refused:
            raise ValueError(refused)
        padded = real and padded_on(self.gpu.arch, request, cached=True)
        self.features = Features.of(request, padded=padded)
        self.layout = request.kv_layout
        if not configs:
            boxes = gluon_works() and self.layout != VECTORS
            hopper = known_turns(hopper_of(self.gpu.arch, request, cached=True)) if boxes else None
            configs = (*([hopper] if hopper else []), config_of(self.gpu.arch, request))
        self.configs = configs
        self.ways: dict[int, tuple[Way, ...]] = {}
        self.vectors = vectors(request.kv_layout, request.kv_dtype)

    def _ways(self, block_m: int) -> tuple[Way, ...]:
        if block_m not in self.ways:
            fit = (self._way(config, block_m) for config in self.configs)
            self.ways[block_m] = tuple(way for way in fit if way is not None)
        return self.ways[block_m]

    def _way(self, config: Config | Hopper, block_m: int) -> Way | None:
        if isinstance(config, Config):
            warps = config.warps if block_m >= 64 else 4
            config = dataclasses.replace(config, block_m=block_m, warps=warps)
            return Way(extend_kernel, config, self.features, self.gpu, self._constants, short=block_m < 64)
        from hal_ops.attention._triton_boxes import boxes_of
        from hal_ops.attention.triton_hopper import hopper_extend

        if block_m != config.block_m or int(self.request.page_size) % 16:
            return None
        boxes = boxes_of if in_boxes(config, self.request) else no_boxes
        return Way(hopper_extend, config, self.features, self.gpu, self._constants, boxes=boxes)

    def plan(self, step: Step) -> Tiles:
        # Tiles are listed one by one, so later steps may have longer rows: this step's say what suits the plan.
        longest = max(step.q_lens, default=0)
        block_m = max(16, 1 << (longest * self.request.group_size - 1).bit_length())
        largest = max(config.block_m for config in self.configs)
        if any(isinstance(config, Hopper) for config in self.configs) or block_m > largest:
            block_m = largest
        tokens = self._ways(block_m)[0].tokens
        device = step.cu_seqlens_q.device
        tiles = staged(self._list(step, tokens), device).to(device, non_blocking=True)
        return Tiles(block_m, tokens, tiles, self._padded(step), self._loop(step, tokens))

    def update(self, step: Step, payload: Tiles) -> Tiles:
        """The plan of another step in the same place, for graphs that hold its address."""
        tiles = staged(self._list(step, payload.tokens), payload.table.device)
        payload.table.copy_(tiles, non_blocking=True)
        payload.padded, payload.loop = self._padded(step), self._loop(step, payload.tokens)
        return payload

    def _loop(self, step: Step, tokens: int) -> bool:
        """Whether programs make several tiles, see :meth:`Way.run`."""
        hopper = next((config for config in self.configs if isinstance(config, Hopper)), None)
        if hopper is None or is_fp8(self.request.kv_dtype):
            return hopper is not None
        left, right = masks.sides(self.request.causal, self.request.window)
        keys = 0.0
        for q_len, kv_len in zip(step.q_lens, step.kv_lens_host, strict=True):
            seen = kv_len if right is None else kv_len - q_len / 2
            keys += q_len * (seen if left is None else min(seen, left + tokens))
        return keys <= _LONG * hopper.block_n * sum(step.q_lens)

    def _padded(self, step: Step) -> bool:
        return self.request.graph or len(step.slot_mapping) > step.num_tokens

    def _list(self, step: Step, tokens: int) -> Tensor:
        """Tiles in order of falling work, and as many empty ones as another step of this size could need."""
        q_lens, kv_lens = (torch.tensor(n, dtype=torch.int64) for n in (step.q_lens, step.kv_lens_host))
        counts = (q_lens + tokens - 1) // tokens
        size = max(len(step.slot_mapping), step.num_tokens) // tokens + step.batch
        rows = torch.repeat_interleave(torch.arange(step.batch), counts)
        first = (torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]) * tokens
        order = torch.argsort(self._keys(first, tokens, q_lens[rows], kv_lens[rows]), descending=True, stable=True)
        tiles = torch.full((size, 2), -1, dtype=torch.int32)
        tiles[: len(rows)] = torch.stack([rows, first], 1)[order].int()
        return tiles

    def _keys(self, first: Tensor, tokens: int, q_lens: Tensor, kv_lens: Tensor) -> Tensor:
        """How many keys tiles see."""
        left, right = masks.sides(self.request.causal, self.request.window)
        shift = kv_lens - q_lens
        end = kv_lens
        if right is not None:
            end = torch.minimum(end, torch.minimum(first + tokens, q_lens) + shift + right)
        return end - (first + shift - left).clamp_min(0) if left is not None else end

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Tiles,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        k_cache, v_cache = by_token(k_cache, self.layout), by_token(v_cache, self.layout)
        out = q.new_empty((*q.shape[:-1], self.request.v_head_dim))
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else out
        if payload.padded:
            out.zero_()
            if return_lse:
                lse.fill_(-torch.inf)
        if out.numel():
            self._run(q, k_cache, v_cache, step, payload, out, lse, sinks, alibi_slopes, k_scale, v_scale, return_lse)
        return (out, lse) if return_lse else out

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        payload: Tiles,
        out: Tensor,
        lse: Tensor,
        sinks: Tensor | None,
        slopes: Tensor | None,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
        return_lse: bool,
    ) -> None:
        ways = self._ways(payload.block_m)
        way, boxes = next((way, boxes) for way in ways if (boxes := way.boxes(k, v)) is not None)
        f = self.features
        scales = tuple(0 if scale is None else scale.numel() for scale in (k_scale, v_scale))
        key = key_of((return_lse, *scales, k.stride(0), v.stride(0)), q, k, v)
        way.run(
            payload.table.shape[0] * way.tile_heads, key, boxes,
            q, k, v, out, lse, sinks, slopes, k_scale, v_scale, payload.table, step.cu_seqlens_q, step.kv_lens,
            step.block_table, f.left, f.right, f.scale, f.cap, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            *out.stride()[:2], step.block_table.stride(0), loop=payload.loop,
        )  # fmt: skip

    def _constants(self, call: tuple[bool, int, int, int, int]) -> dict[str, Any]:
        return_lse, k_scales, v_scales, *_ = call
        size = int(self.request.page_size)
        hopper = next((config for config in self.configs if isinstance(config, Hopper)), None)
        boxes = hopper is not None and in_boxes(hopper, self.request)
        scales = {"K_SCALES": k_scales, "V_SCALES": v_scales}
        known = {"LSE": return_lse, "PAGE_SIZE": size, "TMA": boxes, "ROUND_Q": rounds_queries(self.request)}
        return {**known, **scales, **self.vectors}
