"""The CPU kernels over a paged cache, at the corners that have broken other kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hal_ops import FP8_DTYPES
from hal_ops.attention import AttentionRequest, torch_sdpa
from hal_ops.attention.cases import make_case

RequestOf = Callable[..., AttentionRequest]
AssertRight = Callable[[Sequence[Any]], None]


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN"])
def test_lengths_and_pages(request_of: RequestOf, assert_right: AssertRight, page_size: int, layout: str) -> None:
    # requirement D1, D6
    kv_lens = (1, 5, 9, 15, 16, 17, 25, 33)
    request = request_of(dtype="float16", page_size=page_size, kv_layout=layout)
    for q_of in (lambda n: 1, lambda n: n // 2 + 1, lambda n: n):
        case = make_case(request, "extend", lengths=[(q_of(n), n) for n in kv_lens])
        call = torch_sdpa.extend(request, "cpu")
        assert_right(case.check(call))
        error = (case.call(call)["out"].double() - case.expected()["out"]).abs().max()
        assert error < 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_prefix_with_a_group_of_seven(request_of: RequestOf, assert_right: AssertRight, dtype: str) -> None:
    # requirement D2, D4
    request = request_of(num_q_heads=14, num_kv_heads=2, head_dim=64, dtype=dtype)
    for phase in ("extend", "decode"):
        request = request.replace(max_q_len=8)
        case = make_case(request, phase, lengths=((8, 9),))
        assert_right(case.check(getattr(torch_sdpa, phase)(request, "cpu")))


def test_one_short_and_one_long(request_of: RequestOf, assert_right: AssertRight) -> None:
    # requirement D5
    request = request_of(dtype="float16", return_lse=True)
    for lengths in (((3, 9), (40, 700)), ((1, 9), (1, 700)), ((700, 700), (2, 11), (1, 1), (5, 5))):
        case = make_case(request, "extend", lengths=lengths)
        assert_right(case.check(torch_sdpa.extend(request, "cpu")))


@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
def test_fp8_cache(request_of: RequestOf, assert_right: AssertRight, kv_dtype: str, kv_scale: str) -> None:
    # requirement B6, B7, D12, P30
    for dtype in ("bfloat16", "float16"):
        for layout in ("NHD", "HND", "HDN"):
            request = request_of(
                dtype=dtype, kv_dtype=kv_dtype, kv_scale=kv_scale, kv_layout=layout, return_lse=True, num_kv_heads=3
            )
            for phase in ("extend", "decode"):
                case = make_case(request, phase)
                assert case.kwargs["k_scale"].tolist()[:1] == [0.5]
                assert case.kwargs["v_scale"].tolist()[:1] == [2.0]
                assert_right(case.check(getattr(torch_sdpa, phase)(request, "cpu")))


def test_other_cache_formats(request_of: RequestOf, assert_right: AssertRight) -> None:
    for dtype, kv_dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16")):
        request = request_of(dtype=dtype, kv_dtype=kv_dtype)
        assert_right(make_case(request, "extend").check(torch_sdpa.extend(request, "cpu")))


@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e5m2"])
def test_interleaved_caches(request_of: RequestOf, assert_right: AssertRight, layout: str, kv_dtype: str) -> None:
    # requirement D8
    request = request_of(dtype="bfloat16", kv_dtype=kv_dtype, kv_layout=layout)
    case = make_case(request, "extend", interleaved=True)
    assert case.args[1].stride(0) == 2 * 16 * 2 * 32
    assert_right(case.check(torch_sdpa.extend(request, "cpu")))


def test_caches_of_odd_strides(request_of: RequestOf, assert_right: AssertRight) -> None:
    """A head's elements apart, and vectors that do not start at multiples of their length."""
    for layout in ("NHD", "HND"):
        request = request_of(kv_layout=layout)
        case = make_case(request, "extend")
        for stretch in (
            lambda x: x.repeat_interleave(2, 3)[..., ::2],
            lambda x: torch.cat([x, x[..., :1]], 3)[..., :-1],
        ):
            moved = dataclasses.replace(
                case, args=(case.args[0], stretch(case.args[1]), stretch(case.args[2]), case.args[3])
            )
            assert not moved.args[1].is_contiguous()
            assert_right(moved.check(torch_sdpa.extend(request, "cpu")))


@pytest.mark.parametrize("q_len", [1, 2, 4, 8])
def test_several_queries_a_row(request_of: RequestOf, assert_right: AssertRight, q_len: int) -> None:
    # requirement B16, E11
    for fields in ({}, {"causal": False}, {"window": 16}):
        for kv_dtype in ("bfloat16", "float8_e4m3fn"):
            request = request_of(dtype="bfloat16", kv_dtype=kv_dtype, max_q_len=q_len, return_lse=True, **fields)
            assert_right(make_case(request, "decode").check(torch_sdpa.decode(request, "cpu")))


def test_rows_of_no_keys_among_others(request_of: RequestOf, assert_right: AssertRight) -> None:
    request = request_of(return_lse=True)
    lengths = ((1, 0), (1, 17), (1, 0), (1, 5))
    assert_right(make_case(request, "decode", lengths=lengths).check(torch_sdpa.decode(request, "cpu")))
    lengths = ((0, 0), (4, 2), (4, 17), (4, 2), (0, 5), (2, 40))
    assert_right(make_case(request, "extend", lengths=lengths).check(torch_sdpa.extend(request, "cpu")))
