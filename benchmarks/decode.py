"""Decode over a paged cache: our Triton kernel beside flash-attn 3, as fractions of this device's own copy bandwidth.

``PYTHONPATH=.:ops python benchmarks/decode.py --json out.json`` on a CUDA device. Cases D1 to D17 are serving shapes;
E1 and E2 are the two that the project has targets for. Each case runs over several caches in turn, more than the L2
holds, in one captured graph, so neither launches nor a warm cache count. Bytes are those of the keys and values that
are seen, read once. ``host`` times enqueue one planned call at a time, without waiting, of a short kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_decode_kernels import decode_kernel
from hal_ops.attention.contract import Step
from hal_ops.attention.paged_inputs import make_step
from hal_ops.attention.reference import decode as reference
from hal_ops.attention.triton_decode import decode
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.triton_write import write
from hal_ops.merge_states import MergeStatesRequest
from hal_ops.merge_states.triton_merge import merge

COLD = 256 << 20
"""Bytes of caches that a case goes through before it comes back to the first: four times the L2 of an H200."""
AZURE = (270, 1054, 1249, 1403, 2257, 4153, 1249, 1054)
MOONCAKE = (1113, 2942, 7673, 16435, 43499, 90211, 7673, 2942)


@dataclasses.dataclass(frozen=True)
class Case:
    """``lens``: keys a row. ``extra``: further fields of the request."""

    name: str
    heads: tuple[int, int]
    dim: int
    page: int
    lens: tuple[int, ...]
    extra: tuple[tuple[str, Any], ...] = ()

    def request(self, **fields: Any) -> AttentionRequest:
        return AttentionRequest(
            num_q_heads=self.heads[0], num_kv_heads=self.heads[1], head_dim=self.dim, dtype="bfloat16",
            page_size=self.page, kv_layout="NHD", phases=("decode",), **{**dict(self.extra), **fields},
        )  # fmt: skip


CASES = (
    Case("D1 Llama-8B B1 1k", (32, 8), 128, 16, (1024,)),
    Case("D2 Llama-8B B32 4k", (32, 8), 128, 16, (4096,) * 32),
    Case("D3 Llama-8B B8 32k page 64", (32, 8), 128, 64, (32768,) * 8),
    Case("D4 Llama-70B TP8 B64 mixed", (8, 1), 128, 16, AZURE * 8),
    Case("D5 Llama-70B B16 4k", (64, 8), 128, 16, (4096,) * 16),
    Case("D6 Qwen3-30B B1 64k page 64", (32, 4), 128, 64, (65536,)),
    Case("D7 Qwen3-30B B1 1k page 64", (32, 4), 128, 64, (1024,)),
    Case("D8 gpt-oss B64 8k window 128 sinks", (64, 8), 64, 16, (8192,) * 64, (("window", 128), ("sinks", True))),
    Case("D9 gpt-oss B64 8k sinks", (64, 8), 64, 16, (8192,) * 64, (("sinks", True),)),
    Case("D10 Gemma-2 B16 4k d256 softcap", (16, 8), 256, 16, (4096,) * 16, (("softcap", 50.0),)),
    Case("D11 Qwen2.5-7B B32 2k", (28, 4), 128, 16, (2048,) * 32),
    Case("D12 Llama-8B B256 512", (32, 8), 128, 16, (512,) * 256),
    Case("D13 Llama-8B B32 8k e4m3", (32, 8), 128, 16, (8192,) * 32, (("kv_dtype", "float8_e4m3fn"),)),
    Case("D14 Llama-8B B16 4k 4 queries", (32, 8), 128, 16, (4096,) * 16, (("max_q_len", 4),)),
    Case("D15 Llama-8B B8 skewed page 64", (32, 8), 128, 64, MOONCAKE),
    Case("D16 MHA B16 4000 page 8", (32, 32), 128, 8, (4000,) * 16),
    Case("D17 Qwen3-Next B32 8k d256", (16, 2), 256, 16, (8192,) * 32),
    Case("E1 32/8 d128 B64 8k", (32, 8), 128, 16, (8192,) * 64),
    Case("E2 64/8 d64 B64 8k", (64, 8), 64, 16, (8192,) * 64),
)


@dataclasses.dataclass
class Inputs:
    """One case on the device. ``caches`` are equal in shape; ``num_bytes`` is what one call must read."""

    case: Case
    request: AttentionRequest
    q: torch.Tensor
    step: Step
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    kwargs: dict[str, torch.Tensor]
    num_bytes: int

    @staticmethod
    def of(case: Case, **fields: Any) -> Inputs:
        torch.manual_seed(0)
        request = case.request(**fields)
        pages = [-(-n // case.page) for n in case.lens]
        total = sum(pages)
        table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        order, taken = torch.randperm(total).int(), 0
        for row, count in enumerate(pages):
            table[row, :count] = order[taken : taken + count]
            taken += count
        step = make_step([request.max_q_len] * len(pages), case.lens, table, case.page, "cuda")
        q = torch.randn(step.num_tokens, case.heads[0], case.dim, dtype=torch.bfloat16, device="cuda")
        shape = (total, case.page, case.heads[1], case.dim)
        item = torch_dtype(request.kv_dtype).itemsize
        seen = sum(n if request.window[0] is None else min(n, request.window[0] + request.max_q_len) for n in case.lens)
        num_bytes = 2 * seen * case.heads[1] * case.dim * item
        count = max(1, -(-COLD // (2 * math.prod(shape) * item)))
        caches = [(_random(shape, request), _random(shape, request)) for _ in range(count)]
        kwargs = {}
        if request.sinks:
            kwargs["sinks"] = torch.randn(case.heads[0], device="cuda")
        if is_fp8(request.kv_dtype):
            kwargs |= {"k_scale": torch.ones(1, device="cuda"), "v_scale": torch.ones(1, device="cuda")}
        return Inputs(case, request, q, step, caches, kwargs, num_bytes)

    def error(self, call: Callable[..., Any]) -> float:
        """Largest relative error of a head of a row, against float32."""
        k, v = self.caches[0]
        right = reference(self.request, "cuda", rounded=False)(self.q, k, v, self.step, None, **self.kwargs)
        found = call(k, v).float()
        return float(((found - right).norm(dim=-1) / right.norm(dim=-1)).max())


def _random(shape: tuple[int, ...], request: AttentionRequest) -> torch.Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    return x.to(torch_dtype(request.kv_dtype))


def ours(inputs: Inputs, implementation: Any = None) -> Callable[..., torch.Tensor]:
    impl: Any = implementation or decode(inputs.request, "cuda")
    payload = impl.plan(inputs.step)
    return lambda k, v: impl(inputs.q, k, v, inputs.step, payload, **inputs.kwargs)


def flash_attn_3(inputs: Inputs) -> Callable[..., torch.Tensor]:
    """FA3 with its scheduler's metadata made beforehand. FP8: q is FP8 too, as it asks for."""
    import flash_attn_interface as fa3

    request, step = inputs.request, inputs.step
    rows, heads = step.batch, request.num_kv_heads
    q = inputs.q.view(rows, -1, *inputs.q.shape[1:])
    left = -1 if request.window[0] is None else request.window[0]
    window = (left, 0 if left >= 0 else -1)
    fp8 = is_fp8(request.kv_dtype)
    given = {"sinks": inputs.kwargs["sinks"].bfloat16()} if request.sinks else {}
    if fp8:
        q = q.to(torch.float8_e4m3fn)
        one = torch.ones(rows, heads, device="cuda")
        given = {"q_descale": one, "k_descale": one, "v_descale": one}
    metadata = fa3.get_scheduler_metadata(
        rows, q.shape[1], max(inputs.case.lens), request.num_q_heads, heads, request.head_dim, step.kv_lens,
        qkv_dtype=q.dtype, page_size=request.page_size, causal=True, window_size=window,
        has_softcap=request.softcap > 0,
    )  # fmt: skip

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = fa3.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=step.kv_lens, page_table=step.block_table, softmax_scale=request.softmax_scale,
            causal=True, window_size=window, softcap=request.softcap, scheduler_metadata=metadata, **given,
        )  # fmt: skip
        return out.flatten(0, 1)

    return call


def time_graph(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Median microseconds of one call: all of them captured, one behind the other, the graph replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def time_case(inputs: Inputs, call: Callable[..., Any]) -> float:
    """Microseconds of a call over the case's caches in turn."""
    rounds = max(1, -(-8 // len(inputs.caches)))
    return time_graph([lambda k=k, v=v: call(k, v) for k, v in inputs.caches * rounds])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of device-to-device copies of 4 GiB."""
    source = torch.empty(2 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * source.itemsize / statistics.median(times)


def time_host(call: Callable[[], Any], count: int = 300) -> float:
    """Median host microseconds to enqueue a call, while the device keeps up."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
        if len(times) % 50 == 0:
            torch.cuda.synchronize()
    return statistics.median(times)


def host_overhead() -> dict[str, float]:
    """A planned call of D7, and Triton's own launch of the same kernel with the same arguments."""
    inputs = Inputs.of(CASES[6])
    impl: Any = decode(inputs.request, "cuda")
    payload = impl.plan(inputs.step)
    k, v = inputs.caches[0]
    launches: list[tuple[Any, ...]] = []
    launch = impl._launch
    impl._launch = lambda *arguments: launches.append(arguments)
    impl(inputs.q, k, v, inputs.step, payload)
    impl._launch = launch
    programs, key, *arguments = launches[0]
    constants, options = launch.constants(key), launch._options
    found = {}
    for _ in range(2):
        found["planned call"] = time_host(lambda: impl(inputs.q, k, v, inputs.step, payload))
        found["triton launch"] = time_host(lambda: decode_kernel[(programs,)](*arguments, **constants, **options))
    torch.cuda.synchronize()
    found["plan"] = time_host(lambda: impl.plan(inputs.step))
    found["ratio"] = found["planned call"] / found["triton launch"]
    return found


def time_write(tokens: int = 8192, heads: int = 64, dim: int = 128, **fields: Any) -> tuple[float, float]:
    """Microseconds and bytes a second of one write of keys and values into scattered slots."""
    request = KvCacheWriteRequest(num_kv_heads=heads, head_dim=dim, **fields)
    call = write(request, "cuda")
    k, v = (torch.randn(tokens, heads, dim, dtype=torch_dtype(request.dtype), device="cuda") for _ in range(2))
    pages = 2 * tokens // request.page_size
    middle = (request.page_size, heads) if request.kv_layout == "NHD" else (heads, request.page_size)
    empty = torch.zeros(pages, *middle, dim, device="cuda").to(torch_dtype(request.kv_dtype))
    caches = empty, empty.clone()
    slots = torch.randperm(pages, device="cuda")[: tokens // request.page_size, None] * request.page_size
    slots = (slots + torch.arange(request.page_size, device="cuda")).flatten()
    taken = time_graph([lambda: call(k, v, *caches, slots)] * 8)
    num_bytes = 2 * k.numel() * (k.itemsize + empty.itemsize)
    return taken, num_bytes / (taken * 1e-6)


def time_merge(tokens: int = 8192, heads: int = 32, dim: int = 128) -> tuple[float, float]:
    request = MergeStatesRequest(num_heads=heads, v_head_dim=dim)
    a, b = (torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x, y = (torch.randn(tokens, heads, device="cuda") for _ in range(2))
    call = merge(request, "cuda")
    taken = time_graph([lambda: call(a, x, b, y)] * 8)
    return taken, (3 * a.numel() * 2 + 3 * x.numel() * 4) / (taken * 1e-6)


def run_case(case: Case, copy: float, compare: bool) -> dict[str, Any]:
    inputs = Inputs.of(case)
    row: dict[str, Any] = {"case": case.name, "bytes": inputs.num_bytes}
    for name, make in (("triton", ours), *((("fa3", flash_attn_3),) if compare else ())):
        call = make(inputs)
        row[name] = time_case(inputs, call)
        row[f"{name} error"] = inputs.error(call)
        row[f"{name} of copy"] = inputs.num_bytes / (row[name] * 1e-6) / copy
    if compare:
        row["against fa3"] = row["fa3"] / row["triton"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-fa3", action="store_true")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s")
    rows = []
    for case in CASES:
        if given.only in case.name:
            rows.append(run_case(case, copy, not given.no_fa3))
            print(" ".join(f"{n} {v:.3g}" if isinstance(v, float) else str(v) for n, v in rows[-1].items()), flush=True)
            torch.cuda.empty_cache()
    summary: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy": copy, "cases": rows}
    if not given.no_fa3:
        grid = [row["against fa3"] for row in rows if row["case"].startswith("D")]
        summary["against fa3, D1 to D17"] = statistics.geometric_mean(grid)
    summary["host"] = host_overhead()
    for name, fields in (("bfloat16", {}), ("HND", {"kv_layout": "HND"}), ("e4m3", {"kv_dtype": "float8_e4m3fn"})):
        summary[f"write {name}"] = time_write(**fields)[1] / copy
    summary["merge"] = time_merge()[1] / copy
    print(json.dumps({n: v for n, v in summary.items() if n != "cases"}, indent=1))
    if given.json:
        given.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
