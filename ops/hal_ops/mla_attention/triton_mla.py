"""Latent attention in Triton: absorbed queries over a paged cache of latents, long rows split among programs.

What :func:`extend` and :func:`decode` honour: any number of heads; ``kv_lora_rank`` a power of two from 16 to 512 and
``qk_rope_head_dim`` a multiple of 16 up to 128; float16, bfloat16 and float32, over a cache of that format or an FP8 one
that Triton converts on the arch, with its scale; any page size and any strides but the last; causal or not; any scale;
LSE; any number of queries a row. Each tile of 16 to 64 pairs of a query token and a head reads the entries again.

An entry is read once a tile: its latent is the value, and with the rotated part the key. The plan holds work items
(:mod:`hal_ops.attention._decode_work`) and the memory for partial results, from host lengths only; rows with many
queries are cut into several items. Splits are merged by a second launch, in the order of the keys, so one result is
always the same bits for the same batch; with ``deterministic=True`` it does not depend on the batch either. With
``graph=True`` both launches are of the largest size that the plan's buffers allow, and ``update`` fills them in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._gpu import gpu_of
from hal_ops._launch import Launch
from hal_ops.attention._decode_work import FIELDS, Cut, Work, most_items, work_of
from hal_ops.attention._split_work import Payload, SplitWork
from hal_ops.attention.contract import Step
from hal_ops.mla_attention._triton_mla_configs import Config, config_of
from hal_ops.mla_attention._triton_mla_kernels import merge_kernel, mla_kernel
from hal_ops.mla_attention.contract import MlaAttention
from hal_ops.mla_attention.request import MlaAttentionRequest

__all__ = ["DTYPES", "decode", "extend"]

DTYPES = ("float16", "bfloat16", "float32")
"""Formats of q and of the output, and of a cache that is not FP8."""
MAX_RANK = 512
MAX_ROPE = 128
_MERGED_ROWS = 4
_MERGED_AT_ONCE = 4
_MANY = 64
"""Queries a row that an extend step is taken to have, where its tiles are chosen."""


def extend(request: MlaAttentionRequest, device: object, *, config: Config | None = None) -> MlaAttention:
    """The extend phase.

    Args:
        device: a ``hal`` device, a ``torch.device`` or its name.
        config: tile sizes, for benchmarks and tests; by default those of the table.

    Raises:
        ValueError: a dtype or dims that this kernel does not do.
    """
    _check(request)
    return _Mla(request, device, config, None)


def decode(request: MlaAttentionRequest, device: object, *, config: Config | None = None) -> MlaAttention:
    """The decode phase; arguments and errors are those of :func:`extend`."""
    _check(request)
    return _Mla(request, device, config, request.max_q_len)


def _check(request: MlaAttentionRequest) -> None:
    rank, rope = request.kv_lora_rank, request.qk_rope_head_dim
    wrong = [
        f"{name} {getattr(request, name)}"
        for name, ok in (
            ("dtype", request.dtype in DTYPES),
            ("kv_dtype", request.kv_dtype == request.dtype or is_fp8(request.kv_dtype)),
            ("kv_lora_rank", 16 <= rank <= MAX_RANK and rank & (rank - 1) == 0),
            ("qk_rope_head_dim", rope <= MAX_ROPE and rope % 16 == 0),
        )
        if not ok
    ]
    if wrong:
        raise ValueError(
            f"triton_mla does not do {', '.join(wrong)}: it takes {', '.join(DTYPES)}, a cache of the same format or in "
            f"FP8, a kv_lora_rank that is a power of two from 16 to {MAX_RANK}, and a qk_rope_head_dim that is a multiple "
            f"of 16 up to {MAX_ROPE}; use hal_ops.mla_attention.reference, which does everything"
        )


class _Mla(SplitWork):
    """Both phases. ``queries``: most queries a row; None for any number, which are then cut."""

    counted = False

    def __init__(
        self, request: MlaAttentionRequest, device: object, config: Config | None, queries: int | None
    ) -> None:
        self.request = request
        self.gpu = gpu_of(device)
        self.graph = request.graph
        heads, self.width = request.num_q_heads, request.kv_lora_rank
        self.config = config or config_of(self.gpu.arch, heads * (queries or _MANY), item_of(request))
        tokens = queries or max(1, self.config.rows // heads)
        self.block_m = min(max(16, _power_of_two(heads * tokens)), self.config.rows)
        self.tiles = -(-heads * tokens // self.block_m)
        self.rows = rows_of(heads * tokens, self.block_m)
        self.cut = Cut(
            programs=self.tiles,
            target=int(self.gpu.multiprocessors * self.config.fill),
            slots=self.gpu.multiprocessors * self.config.resident,
            block=self.config.block,
            left=None,
            fixed=request.deterministic,
            tokens=tokens,
        )
        self._cuts_queries = queries is None
        where = self.gpu.device
        self._one = torch.ones(1, device=where)
        self._launch = Launch(mla_kernel, self._constants, where, num_warps=self.config.warps, num_stages=2)
        self._merge = Launch(merge_kernel, self._merge_constants, where, num_warps=4, num_stages=1)

    def _constants(self, key: Key) -> dict[str, Any]:
        return constants_of(self.request, self.config, self.block_m, self.cut.tokens, key)

    def _merge_constants(self, key: Key) -> dict[str, Any]:
        return merge_constants_of(self.request, self.block_m, self.cut.tokens, key)

    def _work(self, step: Step) -> Work:
        if not self._cuts_queries:
            return super()._work(step)
        rows, q_lens, kv_lens = _pieces(step, self.cut.tokens, self.request.causal)
        work = work_of(self.cut, q_lens, kv_lens, len(step.slot_mapping))
        for at in range(0, len(work.numbers), FIELDS):
            work.numbers[at] = rows[work.numbers[at]] if rows else 0
        return work

    def _most(self, step: Step) -> tuple[int, int]:
        tokens = len(step.slot_mapping)
        pieces = step.batch + tokens // self.cut.tokens if self._cuts_queries else step.batch
        return most_items(self.cut, pieces, tokens)

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Payload,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = q.new_empty((*q.shape[:2], self.width))
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else payload.lse
        if not payload.programs:
            return (out, lse) if return_lse else out
        q_strides, strides = q.stride(), cache.stride()
        aligned = (q.data_ptr() | cache.data_ptr()) & 15 == 0
        table, tokens = step.block_table, q.shape[0]
        self._launch(
            payload.programs,
            (return_lse, aligned, q_strides, strides),
            q, cache, out, lse, payload.work, table, payload.out, payload.lse,
            self._one if kv_scale is None else kv_scale, tokens, self.request.softmax_scale,
            q_strides[0], q_strides[1], strides[0], strides[1], table.stride(0),
        )  # fmt: skip
        if payload.slots:
            arguments = out, lse, payload.work, payload.out, payload.lse, tokens
            self._merge(payload.programs, (return_lse, True, (), ()), *arguments)
        return (out, lse) if return_lse else out


Key = tuple[bool, bool, tuple[int, ...], tuple[int, ...]]
"""Whether the LSE is returned, whether addresses are aligned, and the strides of q and of the cache."""


def constants_of(request: MlaAttentionRequest, config: Config, block_m: int, tokens: int, key: Key) -> dict[str, Any]:
    """The constants of the kernel, in its order. ``tokens``: most query tokens an item."""
    return {
        **_shape(request, block_m, tokens),
        "ROPE": request.qk_rope_head_dim,
        "PAGE_SIZE": int(request.page_size),
        # A single query that is the last token sees no key behind it that there could be.
        "MASKED": request.causal and tokens > 1,
        "LSE": key[0],
        "PRECISION": "ieee",
        "SCALED": is_fp8(request.kv_dtype),
        "BLOCK_M": block_m,
        "BLOCK_N": config.block,
        "BLOCK_P": _power_of_two(request.qk_rope_head_dim),
        "STAGES": config.stages,
    }


def merge_constants_of(request: MlaAttentionRequest, block_m: int, tokens: int, key: Key) -> dict[str, Any]:
    """The constants of the merge, in its order."""
    sizes = {"BLOCK_M": block_m, "BLOCK_R": _MERGED_ROWS, "AT_ONCE": _MERGED_AT_ONCE}
    return {**_shape(request, block_m, tokens), "LSE": key[0], **sizes}


def _shape(request: MlaAttentionRequest, block_m: int, tokens: int) -> dict[str, Any]:
    pairs = request.num_q_heads * tokens
    return {
        "HEADS": request.num_q_heads,
        "TILES": -(-pairs // block_m),
        "ROWS": rows_of(pairs, block_m),
        "RANK": request.kv_lora_rank,
    }


def item_of(request: MlaAttentionRequest) -> int:
    """Bytes an element that a configuration is chosen by."""
    own: int = torch_dtype(request.dtype).itemsize
    return 1 if is_fp8(request.kv_dtype) and own == 2 else own


def rows_of(pairs: int, block_m: int) -> int:
    """Rows of a tile's partial result."""
    return min(block_m, -(-pairs // _MERGED_ROWS) * _MERGED_ROWS)


def _pieces(step: Step, tokens: int, causal: bool) -> tuple[list[int], list[int], list[int]]:
    """Rows cut into pieces of at most ``tokens`` queries: each one's row, queries, and keys that its last query sees."""
    rows, q_lens, kv_lens = [], [], []
    for row, (q_len, kv_len) in enumerate(zip(step.q_lens, step.kv_lens_host, strict=True)):
        for start in range(0, q_len, tokens):
            end = min(q_len, start + tokens)
            rows.append(row)
            q_lens.append(end - start)
            kv_lens.append(kv_len - (q_len - end) if causal else kv_len)
    return rows, q_lens, kv_lens


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
