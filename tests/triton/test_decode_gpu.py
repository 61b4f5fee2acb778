"""Decode in Triton on the device itself: every configuration, graphs, addresses past 2**31, host time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_decode_configs import CONFIGS, DEFAULT, Config
from hal_ops.attention.cases import make_case
from hal_ops.attention.paged_inputs import make_step
from hal_ops.attention.reference import decode as reference
from hal_ops.attention.triton_decode import decode

pytestmark = pytest.mark.gpu

EVERY = sorted({*(c for table in CONFIGS.values() for c in table), *DEFAULT}, key=str)


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16", "page_size": 16}
    return AttentionRequest(**{**base, "kv_layout": "NHD", "return_lse": True, **fields})


def shapes(config: Config) -> list[dict[str, Any]]:
    """Requests whose tiles and heads fill a configuration."""
    formats = {1: ("float8_e4m3fn", "float8_e5m2"), 2: ("bfloat16", "float16"), 4: ("float32",)}[config.item]
    fields = {"head_dim": config.dims // 2, "max_q_len": config.rows // 4}
    return [
        {**fields, "kv_dtype": kv, "dtype": "bfloat16" if config.item == 1 else kv, "page_size": page}
        for kv in formats
        for page in (16, 128)
    ]


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_configuration_is_right(config: Config, assert_right: Callable[[Any], None]) -> None:
    """Triton 3.5 to 3.6 and their ptxas have compiled single configurations wrongly (lmdeploy#4920, fla#1262)."""
    for fields in shapes(config):
        request = request_of(**fields)
        lengths = [(request.max_q_len, n) for n in (1500, 67, 128, 700, request.max_q_len)]
        case = make_case(request, "decode", device="cuda", lengths=lengths, oracle="cuda")
        assert_right(case.check(decode(request, "cuda", config=config)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [1, 8, 16, 48, 64, 128, 256])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_dims_and_pages(
    dims: tuple[int, int], page_size: int, dtype: str, assert_right: Callable[[Any], None]
) -> None:  # requirement A5, D1, D6, B13
    request = request_of(head_dim=dims[0], v_head_dim=dims[1], page_size=page_size, dtype=dtype)
    lengths = [(1, n) for n in (1, 5, 9, 15, 16, 17, 25, 33, 1000, 257)]
    case = make_case(request, "decode", device="cuda", lengths=lengths, oracle="cuda")
    assert_right(case.check(decode(request, "cuda")))


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
def test_fp8_caches(kv_dtype: str, kv_scale: str, assert_right: Callable[[Any], None]) -> None:
    # requirement B6, B7, D12
    for dim, layout in ((64, "NHD"), (80, "NHD"), (128, "HND"), (256, "NHD")):
        request = request_of(head_dim=dim, kv_dtype=kv_dtype, kv_scale=kv_scale, kv_layout=layout)
        for scale in ("normal", "outliers"):
            case = make_case(request, "decode", device="cuda", scale=scale, oracle="cuda")
            assert_right(case.check(decode(request, "cuda")))


def test_a_hundred_thousand_keys_in_fp8() -> None:
    """FP8 kernels that sum in less than float32 lose long rows (vllm-project/flash-attention#104)."""
    request = request_of(kv_dtype="float8_e4m3fn", num_q_heads=8, num_kv_heads=1)
    keys = 131072
    table = torch.randperm(keys // 16).int().view(1, -1)
    step = make_step([1], [keys], table, 16, "cuda")
    torch.manual_seed(0)
    q = torch.randn(1, 8, 128, device="cuda").bfloat16()
    k, v = (torch.randn(keys // 16, 16, 1, 128, device="cuda").to(torch.float8_e4m3fn) for _ in "kv")
    one = torch.ones(1, device="cuda")
    impl: Any = decode(request, "cuda")
    found, _ = impl(q, k, v, step, impl.plan(step), k_scale=one, v_scale=one, return_lse=True)
    right, _ = reference(request, "cuda", rounded=False)(q, k, v, step, None, k_scale=one, v_scale=one, return_lse=True)
    assert float((found.float() - right).norm() / right.norm()) < 5e-3


STEPS = [
    ([1] * 8, [1500, 33, 2, 190, 1, 1, 900, 16]),
    ([1] * 8, [2048] * 8),
    ([1] * 3, [5, 2048, 17]),
    ([1] * 8, [100, 640, 640, 2, 3, 4, 5, 2047]),
    ([1], [1]),
]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_captured_graph_serves_other_steps(deterministic: bool) -> None:  # requirement E12, P37, D3
    request = request_of(graph=True, deterministic=deterministic, return_lse=False)
    impl: Any = decode(request, "cuda")
    table = torch.randperm(8 * 128, device="cuda").int().view(8, 128)
    k, v = (torch.randn(8 * 128, 16, 2, 128, device="cuda").bfloat16() for _ in "kv")
    q = torch.randn(8, 8, 128, device="cuda").bfloat16()
    held = make_step(*STEPS[0], table, 16, "cuda")
    payload = impl.plan(held)
    impl(q, k, v, held, payload)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = impl(q, k, v, held, payload)
    addresses = [x.data_ptr() for x in (payload.work, payload.out, payload.lse, payload.counters)]
    for q_lens, kv_lens in STEPS * 2:
        padding = [0] * (8 - len(q_lens))
        now = make_step([*q_lens, *padding], [*kv_lens, *padding], table, 16, "cuda")
        now.slot_mapping = held.slot_mapping
        impl.update(now, payload)
        q.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert [x.data_ptr() for x in (payload.work, payload.out, payload.lse, payload.counters)] == addresses
        tokens = sum(q_lens)
        right = reference(request, "cuda")(q[:tokens], k, v, now, None)
        torch.testing.assert_close(out[:tokens], right, atol=1e-2, rtol=1e-2)
        assert int(out[tokens:].ne(0).sum()) == 0


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages_whose_offset_passes_two_to_the_31(layout: str) -> None:
    request = request_of(kv_layout=layout, return_lse=False, page_size=256)
    pages = (1 << 31) // (256 * 2 * 128) + 9
    shape = (pages, 256, 2, 128) if layout == "NHD" else (pages, 2, 256, 128)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    table = torch.tensor([[pages - 1, 0, pages - 3]], dtype=torch.int32)
    for cache in (k, v):
        cache[table[0].long()] = torch.randn(3, *shape[1:], device="cuda").bfloat16()
    q = torch.randn(1, 8, 128, device="cuda").bfloat16()
    step = make_step([1], [700], table, 256, "cuda")
    impl: Any = decode(request, "cuda")
    found = impl(q, k, v, step, impl.plan(step))
    few = [cache[table[0].long()].clone() for cache in (k, v)]
    near = make_step([1], [700], torch.arange(3).int().view(1, 3), 256, "cuda")
    assert torch.equal(found, impl(q, *few, near, impl.plan(near)))
    torch.testing.assert_close(found, reference(request, "cuda")(q, *few, near, None), atol=1e-2, rtol=1e-2)


def test_a_hundred_runs_give_the_same_bits() -> None:  # requirement D14
    request = request_of(return_lse=False)
    case = make_case(request, "decode", device="cuda", lengths=[(1, n) for n in (4000, 90, 1, 2500)])
    impl: Any = decode(request, "cuda")
    payload = impl.plan(case.args[3])
    first = impl(*case.args, payload)
    assert all(torch.equal(first, impl(*case.args, payload)) for _ in range(100))


def median_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(400):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if len(times) % 40 == 0:
            torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def test_a_planned_call_takes_little_more_host_time_than_a_launch() -> None:  # requirement R7
    request = request_of(return_lse=False)
    case = make_case(request, "decode", device="cuda", lengths=[(1, 900)])
    impl: Any = decode(request, "cuda")
    payload = impl.plan(case.args[3])
    seen: list[tuple[Any, ...]] = []
    launch = impl._launch
    impl._launch = lambda *arguments: seen.append(arguments)
    impl(*case.args, payload)
    impl._launch = launch
    programs, key, *arguments = seen[0]
    constants = launch.constants(key)
    kernel, options = launch._kernel, launch._options
    bare = median_us(lambda: kernel[(programs,)](*arguments, **constants, **options))
    assert median_us(lambda: impl(*case.args, payload)) <= 1.3 * bare
