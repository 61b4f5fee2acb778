"""The attention cases: P prefill, V and X extend (ragged queries over a paged cache), D and E decode, and their inputs.

P1 to P11, V1 to V6, D1 to D17, X1 and X2 are serving shapes of known models; the others are what the project has
targets for (E1, E2, P13 with P14, V0), and common shapes beside them. M1 to M4 of the same list, latent attention, are in
``latents.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest
from hal_ops.attention.reference import prefill as reference
from hal_ops.attention.work import flop, num_bytes

__all__ = ["CASES", "COLD", "JUDGED", "Case", "Inputs", "pages_of"]

COLD = 256 << 20
"""Bytes that a case goes through before it comes back to the first: four times the L2 of an H200."""
JUDGED = 64
"""Last queries of the first and of the last row that are compared with float32."""

AZURE_PREFILL = (207, 396, 1020, 1189, 2734, 4083, 129, 1155)
AZURE_DECODE = (270, 1054, 1249, 1403, 2257, 4153, 1249, 1054)
MOONCAKE = (1113, 2942, 7673, 16435, 43499, 90211, 7673, 2942)
CHUNKS = ((256, 4), (512, 8), (768, 16), (1024, 32), (384, 12), (640, 24), (896, 30), (128, 2))

Lengths = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """``lengths``: (queries, keys) a row. ``page``: 0 for a prefill, which is dense. ``extra``: fields of the request."""

    name: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    lengths: Lengths
    page: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def phase(self) -> str:
        return {"P": "prefill", "V": "extend", "X": "extend"}.get(self.name[0], "decode")

    @property
    def uniform(self) -> bool:
        """Whether all rows are alike."""
        return len(set(self.lengths)) == 1

    def request(self, *, contiguous: bool = False) -> AttentionRequest:
        """What is asked for; ``contiguous``: of a prefill kernel, for keys that lie one behind the other."""
        fields: dict[str, Any] = {
            "num_q_heads": self.heads[0], "num_kv_heads": self.heads[1], "head_dim": self.dims[0],
            "v_head_dim": self.dims[1], "dtype": "bfloat16", **dict(self.extra),
        }  # fmt: skip
        if contiguous:
            only_last = all(q == 1 for q, _ in self.lengths)
            fields["window"] = self.request().window
            fields["causal"] = fields.get("causal", True) and not only_last
            return AttentionRequest(**{**fields, "max_q_len": 1, "phases": ("prefill",)})
        if not self.page:
            return AttentionRequest(**fields, phases=("prefill",))
        return AttentionRequest(**fields, page_size=self.page, kv_layout="NHD", phases=(self.phase,))

    def flop(self) -> float:
        return flop(self.request(), self.lengths)

    def num_bytes(self) -> float:
        return num_bytes(self.request(), self.phase, self.lengths)

    def quick(self) -> Case:
        """The same in small, to try it out."""
        group = max(1, self.heads[0] // self.heads[1])
        small = tuple((min(q, 5 if kv > q else 24), min(kv, 24)) for q, kv in self.lengths[:2])
        dims = (self.dims[0] // 4, self.dims[1] // 4)
        return dataclasses.replace(self, heads=(min(group, 2), 1), dims=dims, lengths=small, page=min(self.page, 16))


def pages_of(lengths: Lengths, size: int) -> tuple[Tensor, int]:
    """A block table over pages in random order, int32 ``[batch, most pages]`` on the host, and how many pages there are."""
    pages = [-(-kv // size) if size else 0 for _, kv in lengths]
    table, order, taken = torch.zeros(len(pages), max(pages), dtype=torch.int32), torch.randperm(sum(pages)), 0
    for row, count in enumerate(pages):
        table[row, :count] = order[taken : taken + count]
        taken += count
    return table, sum(pages)


def _dense(batch: int, length: int) -> Lengths:
    return ((length, length),) * batch


def _ones(keys: tuple[int, ...], queries: int = 1) -> Lengths:
    return tuple((queries, n) for n in keys)


_32_8, _64_8, _128 = (32, 8), (64, 8), (128, 128)
_WINDOW = (("window", 128), ("sinks", True))
_E4M3 = (("kv_dtype", "float8_e4m3fn"),)
CASES = (
    Case("P1 16/16 d128 16k causal", (16, 16), _128, _dense(1, 16384)),
    Case("P2 16/16 d128 16k full", (16, 16), _128, _dense(1, 16384), 0, (("causal", False),)),
    Case("P3 32/32 d64 16k causal", (32, 32), (64, 64), _dense(1, 16384)),
    Case("P4 8/8 d256 16k causal", (8, 8), (256, 256), _dense(1, 16384)),
    Case("P5 Llama-70B 8k", _64_8, _128, _dense(1, 8192)),
    Case("P6 Llama-70B 2k", _64_8, _128, _dense(1, 2048)),
    Case("P7 Llama-70B 8k e4m3", _64_8, _128, _dense(1, 8192), 0, (("qkv_dtype", "float8_e4m3fn"),)),
    Case("P8 gpt-oss B2 8k window 128 sinks", _64_8, (64, 64), _dense(2, 8192), 0, _WINDOW),
    Case("P9 Gemma-2 8k w4096 softcap", (16, 8), (256, 256), _dense(1, 8192), 0, (("window", 4096), ("softcap", 50.0))),
    Case("P10 DeepSeek-V3 4k 192/128", (128, 128), (192, 128), _dense(1, 4096)),
    Case("P11 Qwen3.5 8k d256", (32, 2), (256, 256), _dense(1, 8192)),
    Case("P12 Llama-8B B4 4k", _32_8, _128, _dense(4, 4096)),
    Case("P13 Llama-8B 32k", _32_8, _128, _dense(1, 32768)),
    Case("P14 Llama-8B 32k window 1024", _32_8, _128, _dense(1, 32768), 0, (("window", 1024),)),
    Case("P15 32/8 d96 B2 8k", _32_8, (96, 96), _dense(2, 8192)),
    Case("P16 32/8 d80 B2 8k", _32_8, (80, 80), _dense(2, 8192)),
    Case("V0 Llama-8B B8 512 new on 8k", _32_8, _128, ((512, 8704),) * 8, 16),
    Case("V1 Llama-8B B8 512 of 4608", _32_8, _128, ((512, 4608),) * 8, 16),
    Case("V2 Qwen2.5-7B B16 mixed", (28, 4), _128, tuple((n, n) for n in AZURE_PREFILL * 2), 16),
    Case("V3 Mistral B4 2k of 8k window 4096", _32_8, _128, ((2048, 8192),) * 4, 16, (("window", 4096),)),
    Case("V4 Llama-70B 103", _64_8, _128, ((103, 103),), 16),
    Case("V5 Llama-8B mixed page 64", _32_8, _128, tuple((q, (k << 10) + q) for q, k in CHUNKS), 64),
    Case("V6 Llama-8B e4m3 page 64", _32_8, _128, ((512, 4608),) * 8, 64, _E4M3),
    Case("V7 Llama-8B B8 512 on 8k page 256", _32_8, _128, ((512, 8704),) * 8, 256),
    Case("V8 Llama-8B e4m3 q may be rounded", _32_8, _128, ((512, 4608),) * 8, 64, (*_E4M3, ("fp8_query", True))),
    Case("X1 Llama-8B 1 prefill, 31 decodes", _32_8, _128, ((2048, 2048), *_ones((4096,) * 31)), 16),
    Case("X2 Llama-8B three rows", _32_8, _128, ((1, 1328), (5, 18), (129, 463)), 16),
    Case("D1 Llama-8B B1 1k", _32_8, _128, _ones((1024,)), 16),
    Case("D2 Llama-8B B32 4k", _32_8, _128, _ones((4096,) * 32), 16),
    Case("D3 Llama-8B B8 32k page 64", _32_8, _128, _ones((32768,) * 8), 64),
    Case("D4 Llama-70B TP8 B64 mixed", (8, 1), _128, _ones(AZURE_DECODE * 8), 16),
    Case("D5 Llama-70B B16 4k", _64_8, _128, _ones((4096,) * 16), 16),
    Case("D6 Qwen3-30B B1 64k page 64", (32, 4), _128, _ones((65536,)), 64),
    Case("D7 Qwen3-30B B1 1k page 64", (32, 4), _128, _ones((1024,)), 64),
    Case("D8 gpt-oss B64 8k window 128 sinks", _64_8, (64, 64), _ones((8192,) * 64), 16, _WINDOW),
    Case("D9 gpt-oss B64 8k sinks", _64_8, (64, 64), _ones((8192,) * 64), 16, (("sinks", True),)),
    Case("D10 Gemma-2 B16 4k d256 softcap", (16, 8), (256, 256), _ones((4096,) * 16), 16, (("softcap", 50.0),)),
    Case("D11 Qwen2.5-7B B32 2k", (28, 4), _128, _ones((2048,) * 32), 16),
    Case("D12 Llama-8B B256 512", _32_8, _128, _ones((512,) * 256), 16),
    Case("D13 Llama-8B B32 8k e4m3", _32_8, _128, _ones((8192,) * 32), 16, _E4M3),
    Case("D14 Llama-8B B16 4k 4 queries", _32_8, _128, _ones((4096,) * 16, 4), 16, (("max_q_len", 4),)),
    Case("D15 Llama-8B B8 skewed page 64", _32_8, _128, _ones(MOONCAKE), 64),
    Case("D16 MHA B16 4000 page 8", (32, 32), _128, _ones((4000,) * 16), 8),
    Case("D17 Qwen3-Next B32 8k d256", (16, 2), (256, 256), _ones((8192,) * 32), 16),
    Case("E1 32/8 d128 B64 8k", _32_8, _128, _ones((8192,) * 64), 16),
    Case("E2 64/8 d64 B64 8k", _64_8, (64, 64), _ones((8192,) * 64), 16),
)


@dataclasses.dataclass
class Inputs:
    """A case on a device: ``sets`` of q, k and v, equal in shape, that do not fit its cache together.

    q of a prefill is ``[batch, length, heads, dim]``, k and v too; else q is ``[tokens, heads, dim]`` and k and v are
    pages in the cache's format, which rows have by ``table``, int32 ``[batch, most pages]``, on the host.
    """

    case: Case
    device: str
    sets: list[tuple[Tensor, Tensor, Tensor]]
    table: Tensor
    kwargs: dict[str, Tensor]

    @staticmethod
    def of(case: Case, device: str) -> Inputs:
        torch.manual_seed(0)
        table, pages = pages_of(case.lengths, case.page)
        request = case.request()
        kwargs = {"sinks": torch.randn(case.heads[0], device=device)} if request.sinks else {}
        if is_fp8(request.kv_dtype):
            kwargs |= {name: torch.ones(1, device=device) for name in ("k_scale", "v_scale")}
        held = max(case.num_bytes(), 1 << 16)
        count = min(64, 1 + int(COLD // held)) if torch.device(device).type != "cpu" else 1
        return Inputs(case, device, [_tensors(case, pages, device) for _ in range(count)], table, kwargs)

    def contiguous(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """A set with keys one behind the other: of rows that are alike ``[batch, length, ...]``, else ``[tokens, ...]``."""
        q, *cache = self.sets[index]
        if not self.case.page:
            return q, cache[0], cache[1]
        k, v = (torch.cat([self._row(x, row) for row in range(len(self.table))]) for x in cache)
        if self.case.uniform:
            q, k, v = (x.unflatten(0, (len(self.table), -1)) for x in (q, k, v))
        return q, k, v

    def _row(self, cache: Tensor, row: int) -> Tensor:
        bits = cache.view(torch.uint8) if is_fp8(self.case.request().kv_dtype) else cache
        length = self.case.lengths[row][1]
        pages = self.table[row, : -(-length // self.case.page)].long().to(self.device)
        return bits[pages].flatten(0, 1)[:length].view(cache.dtype)

    def judge(self, out: Tensor) -> float:
        """How far an output for the first set is from float32: the norm of what differs over that of what is right."""
        out = out.reshape(-1, *out.shape[-2:])
        ends, wrong, size = torch.tensor([q for q, _ in self.case.lengths]).cumsum(0).tolist(), 0.0, 0.0
        right = reference(self.case.request(), self.device, rounded=False)
        sinks = {name: x for name, x in self.kwargs.items() if name == "sinks"}
        for row in sorted({0, len(ends) - 1}):
            count = min(JUDGED, self.case.lengths[row][0])
            q, k, v = self._of_row(row, ends[row], count)
            wanted = right(q[None], k[None], v[None], **sinks)[0].float()
            found = out[ends[row] - count : ends[row]].float()
            wrong += float((found - wanted).square().sum())
            size += float(wanted.square().sum())
        return float((wrong / size) ** 0.5)

    def _of_row(self, row: int, end: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.sets[0]
        q = q.reshape(-1, *q.shape[-2:])[end - count : end]
        return (
            (q, self._row(k, row).to(q.dtype), self._row(v, row).to(q.dtype)) if self.case.page else (q, k[row], v[row])
        )


def _tensors(case: Case, pages: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    lead = (pages, case.page) if case.page else (len(case.lengths), case.lengths[0][1])
    queries = (sum(q for q, _ in case.lengths),) if case.page else (len(case.lengths), case.lengths[0][0])
    request = case.request()
    q_dtype, kv_dtype = (torch_dtype(name) for name in (request.qkv_dtype, request.kv_dtype))
    q = torch.randn(*queries, case.heads[0], case.dims[0], device=device).bfloat16().to(q_dtype)
    k_dtype = kv_dtype if case.page else q_dtype
    k, v = (_random((*lead, case.heads[1], dim), device).to(k_dtype) for dim in case.dims)
    return q, k, v


def _random(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
