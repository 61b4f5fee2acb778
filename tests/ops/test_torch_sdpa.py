"""The CPU kernels against the reference: every field, dense and ragged, any mix of lengths; and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal_ops.attention import PHASES, AttentionRequest, torch_sdpa
from hal_ops.attention.cases import make_case

RequestOf = Callable[..., AttentionRequest]
AssertRight = Callable[[Sequence[Any]], None]


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 8},
    "two-sided window": {"causal": False, "window": (3, 2)},
    "right window": {"causal": False, "window": (None, 4)},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "alibi both ways": {"alibi": True, "causal": False},
    "scale": {"softmax_scale": 0.3},
    "short v": {"v_head_dim": 24},
    "long v": {"v_head_dim": 48},
    "odd dims": {"head_dim": 13},
    "heads alone": {"num_kv_heads": 6},
    "one kv head": {"num_kv_heads": 1},
    "all at once": {"sinks": True, "alibi": True, "window": 16, "v_head_dim": 24, "softmax_scale": 0.3},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("phase", PHASES)
def test_corners(request_of: RequestOf, assert_right: AssertRight, phase: str, dtype: str) -> None:
    # requirement A5, B13, D15, P24
    for number, fields in enumerate(CORNERS.values()):
        request = request_of(dtype=dtype, return_lse=bool(number % 2), **fields)
        scale = ("normal", "large", "outliers")[number % 3]
        case = make_case(request, phase, scale=scale, seed=number)
        assert_right(case.check(getattr(torch_sdpa, phase)(request, "cpu")))
        with_lse = dataclasses.replace(
            case, request=request.replace(return_lse=True), kwargs={**case.kwargs, "return_lse": True}
        )
        assert_right(with_lse.check(getattr(torch_sdpa, phase)(with_lse.request, "cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dense(request_of: RequestOf, assert_right: AssertRight, dtype: str) -> None:
    for fields in ({}, {"causal": False}, {"window": 5}, {"sinks": True}, {"num_kv_heads": 6}, {"return_lse": True}):
        request = request_of(dtype=dtype, **fields)
        call = torch_sdpa.prefill(request, "cpu")
        for lengths in (
            ((33, 33),) * 2,
            ((1, 1),) * 3,
            ((1, 20),) * 2,
            ((7, 20),) * 2,
            ((20, 7),),
            ((3, 0),),
            ((0, 3),),
        ):
            case = make_case(request, "prefill", lengths=lengths, form="dense")
            assert_right(case.check(call))
            assert case.call(call)["out"].is_contiguous()


@pytest.mark.parametrize("group", [1, 3, 5, 7, 12, 24])
def test_groups(request_of: RequestOf, assert_right: AssertRight, group: int) -> None:
    # requirement D4
    for phase in PHASES:
        request = request_of(num_q_heads=2 * group, dtype="bfloat16", return_lse=True)
        assert_right(make_case(request, phase).check(getattr(torch_sdpa, phase)(request, "cpu")))


@pytest.mark.parametrize("fields", [{}, {"window": 33}, {"alibi": True}, {"sinks": True}, {"causal": False}])
def test_more_than_one_tile(request_of: RequestOf, assert_right: AssertRight, fields: dict[str, Any]) -> None:
    request = request_of(return_lse=True, **fields)
    for lengths in (((300, 300),), ((200, 420),), ((420, 200),)):
        assert_right(make_case(request, "prefill", lengths=lengths).check(torch_sdpa.prefill(request, "cpu")))
    assert_right(make_case(request, "extend", lengths=((200, 420),)).check(torch_sdpa.extend(request, "cpu")))


@pytest.mark.parametrize("fields", [{}, {"window": 6}, {"sinks": True}])
def test_views_of_one_fused_tensor(request_of: RequestOf, assert_right: AssertRight, fields: dict[str, Any]) -> None:
    # requirement B3, B4
    request = request_of(head_dim=256, dtype="bfloat16", **fields)
    for phase, form in (("prefill", "dense"), ("prefill", "ragged"), ("extend", "ragged"), ("decode", "ragged")):
        case = make_case(request, phase, form=form)
        count = 3 if phase == "prefill" else 1
        views = [x.repeat_interleave(2, -2)[..., ::2, :] for x in case.args[:count]]
        assert not any(x.is_contiguous() for x in views)
        moved = dataclasses.replace(case, args=(*views, *case.args[count:]))
        assert_right(moved.check(getattr(torch_sdpa, phase)(request, "cpu")))


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_at_all(request_of: RequestOf, phase: str) -> None:
    request = request_of(return_lse=True)
    for lengths in (((0, 0),), ((0, 7), (0, 0))):
        found = make_case(request, phase, lengths=lengths).call(getattr(torch_sdpa, phase)(request, "cpu"))
        assert (found["out"].shape, found["lse"].shape) == ((0, 6, 32), (0, 6))


def test_an_empty_ragged_batch(request_of: RequestOf) -> None:
    none = torch.zeros(1, dtype=torch.int32)
    q, kv = torch.zeros(0, 6, 32), torch.zeros(0, 2, 32)
    out = torch_sdpa.prefill(request_of(), "cpu")(q, kv, kv, cu_seqlens_q=none, cu_seqlens_k=none)
    assert out.shape == (0, 6, 32)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=7),
    page_size=st.sampled_from([1, 5, 16]),
    window=st.sampled_from([None, 1, 6, 64]),
    fields=st.sampled_from([{}, {"sinks": True}, {"alibi": True}, {"causal": False, "window": (2, 1)}]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_mix_of_rows(
    request_of: RequestOf,
    assert_right: AssertRight,
    lengths: list[tuple[int, int]],
    page_size: int,
    window: int | None,
    fields: dict[str, Any],
    dtype: str,
) -> None:
    # requirement D5, D15
    request = request_of(**{"window": window, "page_size": page_size, "dtype": dtype, "return_lse": True, **fields})
    for phase in ("prefill", "extend"):
        assert_right(make_case(request, phase, lengths=lengths).check(getattr(torch_sdpa, phase)(request, "cpu")))


def test_the_same_twice_is_the_same_bit_by_bit(request_of: RequestOf) -> None:
    # requirement D14
    for phase in PHASES:
        request = request_of(dtype="bfloat16", deterministic=True, return_lse=True)
        call = getattr(torch_sdpa, phase)(request, "cpu")
        case = make_case(request, phase)
        first, second = case.call(call), case.call(call)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_padded_bounds_change_nothing(request_of: RequestOf) -> None:
    # requirement D3
    request = request_of()
    case = make_case(request, "prefill")
    wide = dataclasses.replace(case, kwargs={**case.kwargs, "max_seqlen_q": 4096, "max_seqlen_k": 8192})
    call = torch_sdpa.prefill(request, "cpu")
    assert torch.equal(case.call(call)["out"], wide.call(call)["out"])
    case = make_case(request, "extend")
    *tensors, step = case.args
    wide = dataclasses.replace(case, args=(*tensors, dataclasses.replace(step, max_q_len=4096, max_kv_len=8192)))
    impl = torch_sdpa.extend(request, "cpu")
    assert torch.equal(case.call(impl)["out"], wide.call(impl)["out"])


@pytest.mark.parametrize(
    ("phase", "fields", "named"),
    [
        ("prefill", {"softcap": 30.0}, "softcap 30.0"),
        ("decode", {"graph": True}, "graph True"),
        ("extend", {"needs_grad": True, "phases": ("prefill", "extend")}, "needs_grad True"),
        ("decode", {"kv_dtype": "int8"}, "kv_dtype int8"),
    ],
)
def test_what_it_cannot_do_is_refused(request_of: RequestOf, phase: str, fields: dict[str, Any], named: str) -> None:
    # requirement P23, P24, C7
    with pytest.raises(ValueError, match=f"torch_sdpa.{phase} does not do {named}"):
        getattr(torch_sdpa, phase)(request_of(**fields), "cpu")


@pytest.mark.parametrize("field", ["sinks", "alibi"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_tensor_is_neither_missed_nor_dropped(request_of: RequestOf, phase: str, field: str) -> None:
    # requirement C7, P24
    with_it, without = make_case(request_of(**{field: True}), phase), make_case(request_of(), phase)
    with pytest.raises(ValueError, match="brings no tensor"):
        without.call(getattr(torch_sdpa, phase)(with_it.request, "cpu"))
    with pytest.raises(ValueError, match=f"{field}=False"):
        with_it.call(getattr(torch_sdpa, phase)(without.request, "cpu"))
