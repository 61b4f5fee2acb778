"""flashinfer's wrapper for latent attention over the formula (0.5.3 to 0.6.18): tables of the host, LSE in base 2.

An e4m3 cache is converted to bfloat16, and multiplied there by scales that are numbers of the host.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import hal
from emulated.attend import attend
from emulated.flashinfer_sizes import mla_plan

__all__ = ["Mla"]

_TILES = 16384


class Mla:
    """``BatchMLAPagedAttentionWrapper``."""

    arch = ""
    version = ""

    def __init__(self, float_workspace_buffer: Tensor, *, backend: str = "auto") -> None:
        assert backend in ("fa2", "fa3"), f"backend={backend!r}: what it becomes depends on version and arch"
        assert backend != "fa3" or self.arch == "sm_90", "fa3 is built for sm_90a"
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self._buffer, self._backend = float_workspace_buffer, backend

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        for table in (qo_indptr, kv_indptr, kv_len_arr):
            assert table.dtype == torch.int32
            assert table.device.type == "cpu", "a table on the device is waited for"
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        if kv_data_type.itemsize == 1:
            since = "0.6.14" if self._backend == "fa3" else "0.6.18"
            assert hal.Version.parse(self.version).satisfies(f">={since}"), f"FP8 since {since}"
            assert self.arch == "sm_90", "FP8 kv_data_type for MLA requires an SM90 (Hopper) device"
            assert (q_data_type, kv_data_type) == (torch.bfloat16, torch.float8_e4m3fn)
        assert len(kv_len_arr), "the mean of no rows"
        self._q_lens, self._kv_lens = qo_indptr.diff().tolist(), kv_len_arr.tolist()
        assert sum(-(-n * num_heads // 64) for n in self._q_lens) < _TILES
        needed = mla_plan(self.arch, sum(self._q_lens) * num_heads, len(kv_len_arr), head_dim_ckv)
        assert self._buffer.numel() >= needed, "Buffer overflow when allocating memory for mla_partial_o"
        self._pages = [kv_indices[a:b].long() for a, b in itertools.pairwise(kv_indptr)]
        self._heads, self._page_size, self._types = num_heads, page_size, (q_data_type, kv_data_type)
        self._causal, self._scale = causal, sm_scale

    def run(
        self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, out: Tensor | None = None,
        return_lse: bool = False, ckv_scale: float | None = None, kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty_like(q_nope) if out is None else out
        assert (q_nope.dtype, ckv_cache.dtype) == (q_pe.dtype, kpe_cache.dtype) == self._types
        fp8 = ckv_cache.itemsize == 1
        assert [type(scale) is float for scale in (ckv_scale, kpe_scale)] == [fp8, fp8], "numbers, for FP8 alone"
        if ckv_scale is not None and kpe_scale is not None:
            ckv_cache, kpe_cache = ckv_cache.bfloat16() * ckv_scale, kpe_cache.bfloat16() * kpe_scale
        assert q_nope.shape == (sum(self._q_lens), self._heads, 512) == out.shape
        assert ckv_cache.shape[1] == self._page_size
        assert all(x.stride(-1) == 1 for x in (q_nope, q_pe, ckv_cache, kpe_cache))
        q = torch.cat([q_nope, q_pe], -1).split(self._q_lens)
        pairs = []
        for queries, pages, kv_len in zip(q, self._pages, self._kv_lens, strict=True):
            k, v = (x[pages].flatten(0, 1)[:kv_len, None] for x in (torch.cat([ckv_cache, kpe_cache], -1), ckv_cache))
            pairs.append(attend(queries, k, v, scale=self._scale, causal=self._causal))
        out.copy_(torch.cat([found for found, _ in pairs]))
        lse = torch.cat([found for _, found in pairs]) / math.log(2.0)
        self._buffer[: 1 << 12].random_()
        return (out, lse) if return_lse else out
