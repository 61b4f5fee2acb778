"""Latent attention in Triton against the reference: corners, poisoned caches, splits, plans filled in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hal
from hal._portable_common import cache_format
from hal_ops.attention.paged_inputs import make_step
from hal_ops.mla_attention import PHASES, MlaAttentionRequest, triton_mla
from hal_ops.mla_attention._triton_mla_configs import Config
from hal_ops.mla_attention.cases import make_case
from hal_ops.mla_attention.reference import extend as reference


def request_of(**fields: Any) -> MlaAttentionRequest:
    base = {"num_q_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "dtype": "float16", "page_size": 16}
    return MlaAttentionRequest(**{**base, **fields})


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32", "return_lse": True},
    "bfloat16": {"dtype": "bfloat16"},
    "1 head": {"num_q_heads": 1},
    "3 heads": {"num_q_heads": 3, "return_lse": True},
    "16 heads": {"num_q_heads": 16},
    "20 heads, 2 queries": {"num_q_heads": 20, "max_q_len": 2, "return_lse": True},
    "128 heads": {"num_q_heads": 128},
    "rank 16, rope 48": {"kv_lora_rank": 16, "qk_rope_head_dim": 48, "return_lse": True},
    "rank 512, rope 64": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "page 1": {"page_size": 1},
    "page 8": {"page_size": 8},
    "page 48": {"page_size": 48, "return_lse": True},
    "page 64": {"page_size": 64},
    "16 queries": {"max_q_len": 16, "return_lse": True},
    "4 queries, bidirectional": {"max_q_len": 4, "causal": False},
    "scale": {"softmax_scale": 0.3},
    "deterministic": {"deterministic": True},
    "graph": {"graph": True, "return_lse": True},
    "e4m3fn": {"kv_dtype": "float8_e4m3fn", "return_lse": True},
    "e4m3fn, float32": {"kv_dtype": "float8_e4m3fn", "dtype": "float32", "max_q_len": 2},
    "e4m3fn, bfloat16, 16 queries": {"kv_dtype": "float8_e4m3fn", "dtype": "bfloat16", "max_q_len": 16},
    "e4m3fnuz, page 48": {"kv_dtype": "float8_e4m3fnuz", "dtype": "bfloat16", "page_size": 48},
    "e5m2, graph": {"kv_dtype": "float8_e5m2", "graph": True, "num_q_heads": 20},
    "e5m2fnuz, rope 48": {"kv_dtype": "float8_e5m2fnuz", "dtype": "bfloat16", "qk_rope_head_dim": 48},
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_right(corner: str, phase: str, device: str, assert_right: Callable[[Any], None]) -> None:
    request = request_of(**CORNERS[corner])
    if device != "cpu" and cache_format(request, hal.device()):
        pytest.skip(f"Triton does not convert {request.kv_dtype} here")
    case = make_case(request, phase, device=device)
    assert_right(case.check(getattr(triton_mla, phase)(request, device)))


@pytest.mark.parametrize("scale", ["large", "outliers"])
@pytest.mark.parametrize("phase", PHASES)
def test_large_numbers_are_right(scale: str, phase: str, device: str, assert_right: Callable[[Any], None]) -> None:
    request = request_of(max_q_len=2, return_lse=True)
    assert_right(
        make_case(request, phase, device=device, scale=scale).check(getattr(triton_mla, phase)(request, device))
    )


def many_splits(request: MlaAttentionRequest, phase: str, device: str, slots: int = 40) -> Any:
    """An implementation that cuts rows in pieces of one block."""
    impl: Any = getattr(triton_mla, phase)(request, device)
    impl.cut = dataclasses.replace(impl.cut, target=slots * impl.cut.programs, slots=1 << 20)
    return impl


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "fields",
    [
        {"return_lse": True},
        {"num_q_heads": 3, "max_q_len": 3},
        {"return_lse": True, "kv_dtype": "float8_e4m3fn"},
        {"num_q_heads": 20, "page_size": 256, "return_lse": True},
    ],
)
def test_splits_are_merged(
    fields: dict[str, Any], phase: str, device: str, assert_right: Callable[[Any], None]
) -> None:
    request = request_of(**fields)
    q_len = request.max_q_len
    lengths = [(q_len, n) for n in (200, q_len, 33, 170)]
    case = make_case(request, phase, device=device, lengths=lengths)
    impl = many_splits(request, phase, device)
    assert impl._work(case.args[2]).slots > 4, "nothing is split"
    assert_right(case.check(impl))


def test_rows_of_many_queries_are_cut_and_split(device: str, assert_right: Callable[[Any], None]) -> None:
    for causal in (True, False):
        request = request_of(causal=causal, return_lse=True)
        case = make_case(request, "extend", device=device, lengths=[(37, 90), (0, 5), (16, 16), (1, 130)])
        impl = many_splits(request, "extend", device, slots=80)
        work = impl._work(case.args[2])
        assert work.slots > 4
        assert {work.numbers[at] for at in range(0, len(work.numbers), 8)} == {0, 2, 3}
        assert_right(case.check(impl))


@pytest.mark.parametrize("config", [Config(32, 2, 32, 4, 2), Config(64, 2, 16, 8, 3), Config(16, 2, 64, 4, 3)])
def test_other_tiles_are_right(config: Config, device: str, assert_right: Callable[[Any], None]) -> None:
    request = request_of(num_q_heads=24, max_q_len=3, return_lse=True)
    for phase in PHASES:
        impl = getattr(triton_mla, phase)(request, device, config=config)
        assert_right(make_case(request, phase, device=device).check(impl))


def test_a_view_of_larger_memory_is_right(device: str) -> None:
    request = request_of(dtype="float32")
    pool = torch.full((5, 2, 16, 96), float("nan"))
    pool[:, 1, :, :80] = torch.randn(5, 16, 80, generator=torch.Generator().manual_seed(0))
    cache = pool[:, 1, :, :80]
    q = torch.randn(2, 5, 80)[:, :4]
    step = make_step([1, 1], [40, 3], torch.tensor([[4, 0, 2], [1, 99, 99]]), 16)
    right = reference(request, "cpu")
    impl = triton_mla.decode(request, device)
    there = make_step([1, 1], [40, 3], torch.tensor([[4, 0, 2], [1, 99, 99]]), 16, device)
    moved = pool.to(device)[:, 1, :, :80]
    found = impl(q.to(device), moved, there, impl.plan(there))
    torch.testing.assert_close(found.cpu(), right(q, cache, step, None), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("phase", PHASES)
def test_a_plan_is_filled_in_place_for_another_step(phase: str, device: str) -> None:
    request = request_of(dtype="float32", graph=True)
    draw = torch.Generator().manual_seed(0)
    cache, q = torch.randn(12, 16, 80, generator=draw), torch.randn(4, 4, 80, generator=draw)
    table = torch.randperm(12, generator=draw).view(4, 3)
    impl = many_splits(request, phase, device)
    step = make_step([1] * 4, [48] * 4, table, 16, device)
    payload = impl.plan(step)
    memory = payload.work.data_ptr(), payload.out.data_ptr(), payload.programs
    steps: list[tuple[list[int], list[int]]] = [([1, 1, 1, 1], [1, 48, 20, 7]), ([1, 0, 1, 0], [30, 0, 48, 0])]
    for q_lens, kv_lens in steps:
        tokens = sum(q_lens)
        small = make_step(q_lens, kv_lens, table, 16, device)
        small.slot_mapping = step.slot_mapping
        payload = impl.update(small, payload)
        assert memory == (payload.work.data_ptr(), payload.out.data_ptr(), payload.programs)
        found = impl(q.to(device), cache.to(device), small, payload).cpu()
        here = make_step(q_lens, kv_lens, table, 16)
        right = reference(request, "cpu")(q[:tokens], cache, here, None)
        torch.testing.assert_close(found[:tokens], right, atol=1e-4, rtol=1e-4)
        assert not found[tokens:].any()


def test_a_cache_without_a_scale_is_as_one_whose_scale_is_1(device: str) -> None:
    request = request_of(kv_dtype="float8_e4m3fn")
    case = make_case(request, "decode", device=device, lengths=[(1, 40), (1, 3)])
    impl: Any = triton_mla.decode(request, device)
    one = torch.ones(1, device=device)
    payload = impl.plan(case.args[2])
    assert torch.equal(impl(*case.args, payload), impl(*case.args, payload, kv_scale=one))


def test_one_payload_gives_the_same_bits_again(device: str) -> None:
    request = request_of()
    case = make_case(request, "decode", device=device, lengths=[(1, n) for n in (200, 90, 1)])
    impl = many_splits(request, "decode", device)
    payload = impl.plan(case.args[2])
    first = impl(*case.args, payload)
    assert torch.equal(first, impl(*case.args, payload))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_lora_rank", 48),
        ("kv_lora_rank", 1024),
        ("qk_rope_head_dim", 20),
        ("dtype", "float64"),
        ("kv_dtype", "float32"),
    ],
)
def test_what_the_kernel_does_not_do_it_refuses(field: str, value: Any, device: str) -> None:
    with pytest.raises(ValueError, match=field):
        triton_mla.decode(request_of(**{field: value}), device)
