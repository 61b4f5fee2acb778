"""Prefill in Triton: attention over fresh keys, dense or ragged.

What :func:`prefill` honours: any heads and group sizes; head dims up to 256, equal or not, in multiples of 16 (why, is
in :mod:`hal_ops.attention.triton_limits`; the interpreter takes any); float16, bfloat16 and float32; q, k and v in an FP8
format that Triton converts on the arch, with scales a tensor or a head (products are of the output's format; where the
arch multiplies FP8, that of q and k is of theirs); causal or not, windows (blocks of keys outside of them cost nothing),
softcap, sinks, ALiBi, any scale; LSE; sequences without queries or without keys. The result is the same bits each time.
There is no backward.

On sm_90 with Triton 3.6 to 3.9 the kernel of :mod:`hal_ops.attention.triton_hopper` is launched for 16-bit formats and
head dims that are sums of two powers of two, and for FP8 and heads of 128, where strides are multiples of 16 elements;
else the one here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops.attention import masks
from hal_ops.attention._triton_configs import (
    Config,
    Hopper,
    config_of,
    hopper_of,
    keys_as_they_are,
    padded_on,
)
from hal_ops.attention._triton_features import Features, check
from hal_ops.attention._triton_place import place
from hal_ops.attention._triton_way import Way, gluon_works, key_of, known_turns
from hal_ops.attention.contract import PrefillAttention
from hal_ops.attention.reference import check_tensors
from hal_ops.attention.request import AttentionRequest
from hal_ops.attention.triton_common import tile
from hal_ops.attention.triton_limits import heads

__all__ = ["prefill", "prefill_kernel"]

_UNIT = 16
_CACHED = 32 << 20
"""Bytes of keys and values that programs running side by side should share: they stay in the device's cache."""


@triton.jit(
    do_not_specialize=[
        "batch", "q_len", "kv_len", "blocks", "section", "left", "right",
        "q_batch_units", "k_batch_units", "v_batch_units",
    ],
    do_not_specialize_on_alignment=["sinks", "slopes", "q_scale", "k_scale", "v_scale", "cu_q", "cu_k"],
)  # fmt: skip
def prefill_kernel(
    q, k, v, out, lse, sinks, slopes, q_scale, k_scale, v_scale, cu_q, cu_k,
    batch, q_len, kv_len, blocks, section, left, right, scale, cap,
    q_batch_units, q_stride, q_head_stride, k_batch_units, k_stride, k_head_stride,
    v_batch_units, v_stride, v_head_stride, out_stride, out_head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, RAGGED: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr, CUT: tl.constexpr, REST: tl.constexpr,
    V_DIM: tl.constexpr, V_CUT: tl.constexpr, V_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    SINKS: tl.constexpr, PLAIN: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    Q_SCALES: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, KEYS_AS_THEY_ARE: tl.constexpr,
):  # fmt: skip
    """One tile of queries, see :func:`hal_ops.attention._triton_place.place`. ``out`` and ``lse`` are contiguous.

    ``batch_units`` are strides divided by ``UNIT``, so that Triton knows rows to be aligned without compiling them in.
    ``Q_SCALES``, ``K_SCALES``, ``V_SCALES``: scales there are: 0, 1, or one a kv head.
    """
    row, head, token, q_start, k_start, out_start, q_len, kv_len = place(
        tl.program_id(0),
        cu_q,
        cu_k,
        batch,
        q_len,
        kv_len,
        blocks,
        section,
        HEADS // PACK,
        PACK,
        BLOCK_M // PACK,
        RAGGED,
    )
    if token >= q_len:
        return
    q += row.to(tl.int64) * (q_batch_units.to(tl.int64) * UNIT) + (q_start + token).to(tl.int64) * q_stride
    q += head.to(tl.int64) * q_head_stride
    k += row.to(tl.int64) * (k_batch_units.to(tl.int64) * UNIT) + k_start.to(tl.int64) * k_stride
    k += (head // GROUP).to(tl.int64) * k_head_stride
    v += row.to(tl.int64) * (v_batch_units.to(tl.int64) * UNIT) + k_start.to(tl.int64) * v_stride
    v += (head // GROUP).to(tl.int64) * v_head_stride
    out += (out_start + token).to(tl.int64) * out_stride + head * out_head_stride
    lse += (out_start + token).to(tl.int64) * HEADS + head
    if Q_SCALES > 0:
        scale *= tl.load(q_scale + (head // GROUP if Q_SCALES > 1 else 0))
    if K_SCALES > 0:
        scale *= tl.load(k_scale + (head // GROUP if K_SCALES > 1 else 0))
    factor = 1.0
    if V_SCALES > 0:
        factor = tl.load(v_scale + (head // GROUP if V_SCALES > 1 else 0))
    tile(
        q, k, v, out, out, lse, sinks, slopes, head, token, q_len, kv_len, left, right, scale, cap, factor,
        q_stride, q_head_stride, 0, k_stride, 0, v_stride, out_stride, out_head_stride,
        HEADS, PACK, 0, DIM, CUT, REST, V_DIM, V_CUT, V_REST, BLOCK_M, BLOCK_N,
        HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, SINKS, PLAIN, LSE, PRECISION, 0, 0, KEYS_AS_THEY_ARE,
    )  # fmt: skip


def prefill(
    request: AttentionRequest, device: object, *, configs: tuple[Config | Hopper, ...] = ()
) -> PrefillAttention:
    """The prefill phase.

    Args:
        device: a ``hal`` device, a ``torch.device`` or its name.
        configs: tile sizes, for benchmarks and tests; the first whose kernel can run is taken. By default the table's.

    Raises:
        ValueError: a dtype, a head dim or an option that this kernel does not do.
    """
    check(request, "prefill")
    return _Prefill(request, device, configs)


_LONG = 40
"""Most blocks of keys in a tile, on average, for programs of several tiles: on an H200 these took 0.96 of the time of
programs of one with 16 blocks, 0.97 with 32 (8k causal tokens, 64/8 heads of 128), and 1.01 with 128."""
_ROUNDS = 12
"""Fewest tiles a multiprocessor in a section, in which tiles get shorter, for shares that are even to some percent: by
arithmetic; with 4 of them the shares of 16 heads over 16k tokens differ by 1.3."""


class _Prefill:
    def __init__(self, request: AttentionRequest, device: object, configs: tuple[Config | Hopper, ...]) -> None:
        self.request = request
        self.dtype = torch_dtype(request.dtype)
        self.gpu = gpu_of(device)
        real = self.gpu.device.type != "cpu"
        refused = heads(request, cached=False) if real else ""
        if refused:
            raise ValueError(refused)
        padded = real and padded_on(self.gpu.arch, request, cached=False)
        self.features = Features.of(request, padded=padded)
        constants = self.features.constants
        constants["KEYS_AS_THEY_ARE"] = keys_as_they_are(self.gpu.arch, request, constants["CUT"], constants["REST"])
        if not configs:
            hopper = known_turns(hopper_of(self.gpu.arch, request, cached=False)) if gluon_works() else None
            configs = (*([hopper] if hopper else []), config_of(self.gpu.arch, request))
        self.ways = tuple(self._way(config) for config in configs)

    def _way(self, config: Config | Hopper) -> Way:
        if isinstance(config, Config):
            return Way(prefill_kernel, config, self.features, self.gpu, _constants)
        from hal_ops.attention._triton_boxes import boxes_of
        from hal_ops.attention.triton_hopper import hopper_prefill

        return Way(hopper_prefill, config, self.features, self.gpu, _constants, boxes=boxes_of)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensors(self.request, sinks, alibi_slopes)
        out = q.new_empty((*q.shape[:-1], self.request.v_head_dim), dtype=self.dtype)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else out
        extras = (sinks, alibi_slopes, q_scale, k_scale, v_scale, cu_seqlens_q, cu_seqlens_k)
        if out.numel() and cu_seqlens_q is None:
            self._run(q, k, v, out, lse, extras, q.shape[0], k.shape[1], return_lse)
        elif out.numel() and cu_seqlens_q is not None:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            batch = cu_seqlens_q.shape[0] - 1
            keys = max_seqlen_k or -(-k.shape[1] // batch)
            self._run(q, k, v, out, lse, extras, batch, keys, return_lse)
        return (out, lse) if return_lse else out

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extras: tuple[Tensor | None, ...],
        batch: int,
        keys: int,
        return_lse: bool,
    ) -> None:
        """q, k, v are ``[batch, tokens, heads, dim]``, or ``[1, tokens, heads, dim]`` with cumulative lengths.

        ``extras``: sinks, slopes, the scales of q, k and v, and the cumulative lengths of queries and keys.
        """
        way, boxes = next((way, boxes) for way in self.ways if (boxes := way.boxes(k, v)) is not None)
        ragged = extras[-1] is not None
        q_len = q.shape[1]
        blocks = q_len // way.tokens + batch if ragged else -(-q_len // way.tokens)
        pairs = way.tile_heads * q.shape[0]
        section = min(pairs, self._section(way, keys))
        f = self.features
        outer = q.stride(0), k.stride(0), v.stride(0)
        unit = 1 if any(stride % _UNIT for stride in outer) else _UNIT
        scales = () if q.dtype is self.dtype else tuple(0 if s is None else s.numel() for s in extras[2:5])
        way.run(
            blocks * pairs, key_of((return_lse, ragged, unit, *scales), q, k, v), boxes,
            q, k, v, out, lse, *extras, batch, q_len, k.shape[1], blocks,
            section, f.left, f.right, f.scale, f.cap,
            outer[0] // unit, *q.stride()[1:3], outer[1] // unit, *k.stride()[1:3], outer[2] // unit, *v.stride()[1:3],
            out.stride(-3), out.stride(-2), loop=self._loop(way, keys, blocks * section, section < pairs),
        )  # fmt: skip

    def _loop(self, way: Way, keys: int, tiles: int, sections: bool) -> bool:
        """Whether programs make several tiles, see :meth:`Way.run`; ``tiles`` are those of a section."""
        left, right = masks.sides(self.request.causal, self.request.window)
        alike = right is None or left is not None
        span = keys if alike else keys // 2
        if left is not None and right is not None:
            span = min(span, left + right + way.tokens)
        even = alike or not sections or tiles >= _ROUNDS * way.multiprocessors
        return even and span <= _LONG * way.block_n

    def _section(self, way: Way, keys: int) -> int:
        """How many pairs of sequence and head run side by side, so that their keys and values stay in the cache."""
        r = self.request
        size: int = torch_dtype(r.qkv_dtype).itemsize * max(1, keys) * (r.head_dim + r.v_head_dim)
        return max(1, _CACHED // size) * (r.group_size // way.pack)


def _constants(call: tuple[Any, ...]) -> dict[str, Any]:
    return_lse, ragged, unit, *scales = call
    known = {"LSE": return_lse, "RAGGED": ragged, "UNIT": unit}
    return {**known, **dict(zip(("Q_SCALES", "K_SCALES", "V_SCALES"), scales or (0, 0, 0), strict=True))}
