"""Attention on a CUDA device: our Triton kernels beside torch's, flash-attn 3 and flashinfer; one table and one JSON.

``PYTHONPATH=.:ops python benchmarks/attention.py --json out.json``. Prefill (P), extend (V, X: ragged queries over a
paged cache) and, from ``decode.py`` beside this file, decode (D). All sides of a ratio run in this one process, on
random data; times are medians. What is compared with is what can be imported.

FLOP count 2 for each product of a query with a key that it sees, and of a weight with a value. Fractions are of this
device's own rates, measured first: a bfloat16 product of 8192 x 8192 matrices, and a copy. ``torch`` is
``scaled_dot_product_attention`` by its flash and by its cuDNN kernel, over contiguous keys, where that means the same.
Short cases run over several inputs in turn, more than the L2 holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest, masks
from hal_ops.attention.paged_inputs import make_step
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_prefill import prefill

Call = Callable[[], Any]
L2 = 180 << 20
AZURE = (207, 396, 1020, 1189, 2734, 4083, 129, 1155)
CHUNKS = ((256, 4), (512, 8), (768, 16), (1024, 32), (384, 12), (640, 24), (896, 30), (128, 2))


@dataclasses.dataclass(frozen=True)
class Case:
    """``lengths``: (queries, keys) a row. ``page``: 0 for a prefill, which is dense."""

    name: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    lengths: tuple[tuple[int, int], ...]
    page: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    def request(self) -> AttentionRequest:
        return AttentionRequest(
            num_q_heads=self.heads[0], num_kv_heads=self.heads[1], head_dim=self.dims[0], v_head_dim=self.dims[1],
            dtype="bfloat16", page_size=self.page or 16, kv_layout="NHD", **dict(self.extra),
        )  # fmt: skip

    def flop(self) -> float:
        limits = masks.sides(self.request().causal, self.request().window)
        pairs = sum(_pairs(q, kv, limits) for q, kv in self.lengths)
        return 2.0 * self.heads[0] * sum(self.dims) * pairs

    def num_bytes(self) -> float:
        """Each of q, k, v read and out written once."""
        request = self.request()
        queries, keys = (sum(n) for n in zip(*self.lengths, strict=True))
        item = torch_dtype(request.kv_dtype).itemsize if self.page else 2
        return (2 * queries * self.heads[0] + item * keys * self.heads[1]) * float(sum(self.dims))


def _pairs(q_len: int, kv_len: int, limits: Any) -> int:
    positions = torch.arange(kv_len - q_len, kv_len)
    low = torch.zeros_like(positions) if limits[0] is None else (positions - limits[0]).clamp_min(0)
    high = torch.full_like(positions, kv_len) if limits[1] is None else (positions + limits[1] + 1).clamp_max(kv_len)
    return int((high - low).clamp_min(0).sum())


def dense(batch: int, length: int) -> tuple[tuple[int, int], ...]:
    return ((length, length),) * batch


CASES = (
    Case("P1 16/16 d128 16k causal", (16, 16), (128, 128), dense(1, 16384)),
    Case("P2 16/16 d128 16k full", (16, 16), (128, 128), dense(1, 16384), 0, (("causal", False),)),
    Case("P3 32/32 d64 16k causal", (32, 32), (64, 64), dense(1, 16384)),
    Case("P4 8/8 d256 16k causal", (8, 8), (256, 256), dense(1, 16384)),
    Case("P5 Llama-70B 8k", (64, 8), (128, 128), dense(1, 8192)),
    Case("P6 Llama-70B 2k", (64, 8), (128, 128), dense(1, 2048)),
    Case("P8 gpt-oss B2 8k window 128 sinks", (64, 8), (64, 64), dense(2, 8192), 0, (("window", 128), ("sinks", True))),
    Case(
        "P9 Gemma-2 8k window 4096 softcap",
        (16, 8),
        (256, 256),
        dense(1, 8192),
        0,
        (("window", 4096), ("softcap", 50.0)),
    ),
    Case("P10 DeepSeek-V3 4k 192/128", (128, 128), (192, 128), dense(1, 4096)),
    Case("P11 Qwen3.5 8k d256", (32, 2), (256, 256), dense(1, 8192)),
    Case("P12 Llama-8B B4 4k", (32, 8), (128, 128), dense(4, 4096)),
    Case("P13 Llama-8B 32k", (32, 8), (128, 128), dense(1, 32768)),
    Case("P14 Llama-8B 32k window 1024", (32, 8), (128, 128), dense(1, 32768), 0, (("window", 1024),)),
    Case("P15 32/8 d96 B2 8k", (32, 8), (96, 96), dense(2, 8192)),
    Case("P16 32/8 d80 B2 8k", (32, 8), (80, 80), dense(2, 8192)),
    Case("V0 Llama-8B B8 512 new on 8k", (32, 8), (128, 128), ((512, 8704),) * 8, 16),
    Case("V1 Llama-8B B8 512 of 4608", (32, 8), (128, 128), ((512, 4608),) * 8, 16),
    Case("V2 Qwen2.5-7B B16 mixed", (28, 4), (128, 128), tuple((n, n) for n in AZURE * 2), 16),
    Case("V3 Mistral B4 2k of 8k window 4096", (32, 8), (128, 128), ((2048, 8192),) * 4, 16, (("window", 4096),)),
    Case("V4 Llama-70B 103", (64, 8), (128, 128), ((103, 103),), 16),
    Case("V5 Llama-8B mixed page 64", (32, 8), (128, 128), tuple((q, (k << 10) + q) for q, k in CHUNKS), 64),
    Case("V6 Llama-8B e4m3 page 64", (32, 8), (128, 128), ((512, 4608),) * 8, 64, (("kv_dtype", "float8_e4m3fn"),)),
    Case("V7 Llama-8B B8 512 new on 8k page 256", (32, 8), (128, 128), ((512, 8704),) * 8, 256),
    Case("X1 Llama-8B 1 prefill, 31 decodes", (32, 8), (128, 128), ((2048, 2048), *(((1, 4096),) * 31)), 16),
    Case("X2 Llama-8B three rows", (32, 8), (128, 128), ((1, 1328), (5, 18), (129, 463)), 16),
)


@dataclasses.dataclass
class Inputs:
    """A case on the device; ``sets`` are as many (q, k, v) as do not fit the L2 together."""

    case: Case
    request: AttentionRequest
    sets: list[tuple[Tensor, Tensor, Tensor]]
    step: Any
    kwargs: dict[str, Tensor]

    @staticmethod
    def of(case: Case) -> Inputs:
        torch.manual_seed(0)
        request = case.request()
        kwargs = {"sinks": torch.randn(case.heads[0], device="cuda")} if request.sinks else {}
        if is_fp8(request.kv_dtype):
            kwargs |= {"k_scale": torch.ones(1, device="cuda"), "v_scale": torch.ones(1, device="cuda")}
        pages = [-(-kv // case.page) if case.page else 0 for _, kv in case.lengths]
        step = _step(case, pages) if case.page else None
        count = min(64, 1 + int(L2 // case.num_bytes()))
        return Inputs(case, request, [_tensors(case, request, sum(pages)) for _ in range(count)], step, kwargs)


def _step(case: Case, pages: list[int]) -> Any:
    table, order, taken = torch.zeros(len(pages), max(pages), dtype=torch.int32), torch.randperm(sum(pages)).int(), 0
    for row, count in enumerate(pages):
        table[row, :count] = order[taken : taken + count]
        taken += count
    return make_step([q for q, _ in case.lengths], [kv for _, kv in case.lengths], table, case.page, "cuda")


def _tensors(case: Case, request: AttentionRequest, pages: int) -> tuple[Tensor, Tensor, Tensor]:
    lead = (pages, case.page) if case.page else (len(case.lengths), case.lengths[0][1])
    queries = (sum(q for q, _ in case.lengths),) if case.page else (len(case.lengths), case.lengths[0][0])
    q = torch.randn(*queries, case.heads[0], case.dims[0], device="cuda").bfloat16()
    kv_dtype = torch_dtype(request.kv_dtype) if case.page else torch.bfloat16
    k, v = (torch.randn(*lead, case.heads[1], dim, device="cuda").bfloat16().to(kv_dtype) for dim in case.dims)
    return q, k, v


def triton_calls(inputs: Inputs) -> list[Call]:
    if inputs.step is None:
        run: Any = prefill(inputs.request, "cuda")
        return [lambda s=s: run(*s, **inputs.kwargs) for s in inputs.sets]
    impl: Any = extend(inputs.request, "cuda")
    payload = impl.plan(inputs.step)
    return [lambda s=s: impl(*s, inputs.step, payload, **inputs.kwargs) for s in inputs.sets]


def flash_attn_3_calls(inputs: Inputs) -> list[Call]:
    fa3 = importlib.import_module("flash_attn_interface")
    r, step = inputs.request, inputs.step
    if is_fp8(r.kv_dtype):
        raise NotImplementedError("it takes an FP8 cache with FP8 queries only")
    window = (-1, -1) if r.window[0] is None else (r.window[0], 0)
    more: dict[str, Any] = {"causal": r.causal, "window_size": window, "softcap": r.softcap}
    if r.sinks:
        raise NotImplementedError("flash_attn_func takes no sinks")
    if step is None:
        return [lambda s=s: fa3.flash_attn_func(*s, **more) for s in inputs.sets]
    more |= {"cache_seqlens": step.kv_lens, "page_table": step.block_table}
    more |= {"cu_seqlens_q": step.cu_seqlens_q, "max_seqlen_q": step.max_q_len}
    return [lambda s=s: fa3.flash_attn_with_kvcache(*s, **more) for s in inputs.sets]


def torch_calls(backend: SDPBackend) -> Callable[[Inputs], list[Call]]:
    def make(inputs: Inputs) -> list[Call]:
        r = inputs.request
        if inputs.step is not None or r.window != (None, None) or r.softcap or r.sinks:
            raise NotImplementedError("not one call of this function")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gqa = r.group_size > 1
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=r.causal, enable_gqa=gqa).transpose(1, 2)

        turned = [tuple(x.transpose(1, 2) for x in s) for s in inputs.sets]
        return [lambda s=s: attend(*s) for s in turned]

    return make


def flashinfer_calls(inputs: Inputs) -> list[Call]:
    flashinfer = importlib.import_module("flashinfer")
    r, step = inputs.request, inputs.step
    if step is None or r.sinks or is_fp8(r.kv_dtype):
        raise NotImplementedError("compared on paged caches alone")
    memory = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, "NHD")
    counts = [-(-kv // step.page_size) for kv in step.kv_lens_host]
    starts = torch.tensor([0, *counts]).cumsum(0).int().cuda()
    indices = torch.cat([step.block_table[row, :count] for row, count in enumerate(counts)])
    last = torch.tensor([(kv - 1) % step.page_size + 1 for kv in step.kv_lens_host]).int().cuda()
    left = -1 if r.window[0] is None else r.window[0]
    wrapper.plan(
        step.cu_seqlens_q, starts, indices, last, r.num_q_heads, r.num_kv_heads, r.head_dim, step.page_size,
        causal=r.causal, window_left=left, q_data_type=torch.bfloat16,
    )  # fmt: skip
    return [lambda s=s: wrapper.run(s[0], (s[1], s[2])) for s in inputs.sets]


SIDES: dict[str, Callable[[Inputs], list[Call]]] = {
    "triton": triton_calls,
    "fa3": flash_attn_3_calls,
    "torch flash": torch_calls(SDPBackend.FLASH_ATTENTION),
    "torch cudnn": torch_calls(SDPBackend.CUDNN_ATTENTION),
    "flashinfer": flashinfer_calls,
}


def seconds(calls: list[Call], budget: float = 0.15) -> float:
    """Median seconds of one call, by device events around rounds over all inputs."""
    for call in calls[:3]:
        call()
    once = _round(calls)
    return statistics.median(_round(calls) for _ in range(max(5, min(30, int(budget / (once * len(calls)))))))


def _round(calls: list[Call]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / len(calls)


def rates() -> dict[str, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a matrix product."""
    x = torch.empty(2 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {"copy": 2 * x.numel() * 2 / seconds([lambda: y.copy_(x)]), "matmul": 2 * 8192**3 / seconds([lambda: a @ b])}


def run_case(case: Case, sides: dict[str, Callable[[Inputs], list[Call]]], device: dict[str, float]) -> dict[str, Any]:
    inputs = Inputs.of(case)
    row: dict[str, Any] = {"case": case.name, "flop": case.flop(), "bytes": case.num_bytes()}
    right: Tensor | None = None
    for name, make in sides.items():
        try:
            calls = make(inputs)
            out = calls[0]()
        except (ImportError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            row[f"{name} absent"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        out = (out[0] if isinstance(out, tuple) else out).float()
        right = out if right is None else right
        row[name] = seconds(calls)
        row[f"{name} differs"] = float((out - right).norm() / right.norm())
    taken = row["triton"]
    row["of matmul"] = row["flop"] / taken / device["matmul"]
    row["of copy"] = row["bytes"] / taken / device["copy"]
    return row


def heading() -> str:
    others = "".join(f"{name:>13}" for name in list(SIDES)[1:])
    return f"{'':40}{'us':>9}{'TFLOP/s':>9}{'of matmul':>10}{'TB/s':>7}{'of copy':>8}{others}"


def line(row: dict[str, Any]) -> str:
    taken = row["triton"]
    others = "".join(f"{row[n] / taken:12.2f}x" if n in row else f"{'-':>13}" for n in list(SIDES)[1:])
    rate, traffic = row["flop"] / taken / 1e12, row["bytes"] / taken / 1e12
    ours = f"{taken * 1e6:9.1f}{rate:9.0f}{row['of matmul']:10.2f}{traffic:7.2f}{row['of copy']:8.2f}"
    return f"{row['case']:40}{ours}{others}"


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for letters, what in (("P", "prefill"), ("VX", "extend")):
        for name in list(SIDES)[1:]:
            ratios = [row[name] / row["triton"] for row in rows if row["case"][0] in letters and name in row]
            if ratios:
                found[f"{what}, geometric mean against {name}"] = statistics.geometric_mean(ratios)
    by_name = {row["case"].split()[0]: row for row in rows}
    if {"P13", "P14"} <= set(by_name):
        found["window 1024 at 32k, times faster than without"] = by_name["P13"]["triton"] / by_name["P14"]["triton"]
    return found


def decode_rows(copy: float) -> list[dict[str, Any]]:
    sys.path.insert(0, str(Path(__file__).parent))
    decode = importlib.import_module("decode")
    compare = importlib.util.find_spec("flash_attn_interface") is not None
    return [decode.run_case(case, copy, compare) for case in decode.CASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--without", default="", help="sides to leave out, with commas")
    parser.add_argument("--no-decode", action="store_true")
    given = parser.parse_args()
    device = rates()
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {device['copy'] / 1e12:.2f} TB/s, matmul {device['matmul'] / 1e12:.0f} TFLOP/s")
    print("times of the others as multiples of ours")
    sides = {n: make for n, make in SIDES.items() if n not in given.without.split(",")}
    rows: list[dict[str, Any]] = []
    print(heading())
    for case in CASES:
        if given.only in case.name:
            rows.append(run_case(case, sides, device))
            print(line(rows[-1]), flush=True)
    found = summary(rows)
    decode = [] if given.no_decode else decode_rows(device["copy"])
    for row in decode:
        print(" ".join(f"{n} {v:.3g}" if isinstance(v, float) else str(v) for n, v in row.items()))
    print(json.dumps(found, indent=1))
    if given.json:
        rows_json = {"device": name, **device, "summary": found, "cases": rows, "decode": decode}
        given.json.write_text(json.dumps(rows_json, indent=1) + "\n")


if __name__ == "__main__":
    main()
