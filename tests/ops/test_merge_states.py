"""Merged states of split keys equal attention over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hal_ops.attention import AttentionRequest, reference, torch_sdpa
from hal_ops.merge_states import MergeStatesRequest, torch_merge
from hal_ops.merge_states import reference as merge_reference
from hal_ops.merge_states.cases import make_case

REQUEST = MergeStatesRequest(num_heads=6, v_head_dim=32, dtype="float32")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_against_the_reference(assert_right: Any, dtype: str) -> None:
    request = MergeStatesRequest(num_heads=5, v_head_dim=24, dtype=dtype)
    for module in (torch_merge, merge_reference):
        for seed in range(3):
            assert_right(make_case(request, seed=seed).check(module.merge(request, "cpu")))


@pytest.mark.parametrize("module", [torch_merge, merge_reference])
def test_states_without_keys(module: Any) -> None:
    # requirement B15
    merge = module.merge(REQUEST, "cpu")
    out, lse = torch.randn(4, 6, 32), torch.randn(4, 6)
    nan, none = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for first, second in (((out, lse), (nan, none)), ((nan, none), (out, lse))):
        found = merge(*first, *second)
        torch.testing.assert_close(found, (out, lse))
    both = merge(nan, none, torch.zeros_like(out), none)
    assert (both[0] == 0).all()
    assert (both[1] == -torch.inf).all()


def test_a_lost_row_stays_lost() -> None:
    """NaN of a state that has keys is not hidden."""
    out, lse = torch.randn(4, 6, 32), torch.randn(4, 6)
    bad = out.clone()
    bad[2, 1] = torch.nan
    for module in (torch_merge, merge_reference):
        found, _ = module.merge(REQUEST, "cpu")(out, lse, bad, lse)
        assert torch.equal(found.isnan(), bad.isnan())


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 24), min_size=1, max_size=4).map(sorted),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    sinks=st.booleans(),
)
def test_split_keys(request_of: Callable[..., AttentionRequest], cuts: list[int], dtype: str, sinks: bool) -> None:
    # requirement B15
    request = request_of(dtype=dtype, causal=False, return_lse=True)
    with_sinks = request.replace(sinks=sinks)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 32, generator=draw).to(getattr(torch, dtype)) for n, h in ((7, 6), (24, 2), (24, 2)))
    learned = {"sinks": torch.randn(6, generator=draw)} if sinks else {}
    whole = torch_sdpa.prefill(with_sinks, "cpu")(q[None], k[None], v[None], return_lse=True, **learned)
    states = []
    for turn, (a, b) in enumerate(zip([0, *cuts], [*cuts, 24], strict=True)):
        module = (torch_sdpa, reference)[turn % 2]
        call = module.prefill(with_sinks if turn == 0 else request, "cpu")
        states.append(call(q[None], k[None, a:b], v[None, a:b], return_lse=True, **(learned if turn == 0 else {})))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for merged in (torch_merge.merge_all(states), folded(states)):
        torch.testing.assert_close(merged[0], whole[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(merged[1], whole[1], atol=1e-4, rtol=1e-4)


def folded(states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    merge = torch_merge.merge(REQUEST, "cpu")
    total = states[0]
    for state in states[1:]:
        total = merge(*total, *state)
    return total


def test_many_states_are_rounded_once() -> None:
    """256 equal bfloat16 states: folding rounds 255 times, merging all at once does not."""
    value = torch.tensor(1 / 3).bfloat16()
    states = [(value.expand(1, 1, 8), torch.tensor([[0.0]]))] * 256
    out, lse = torch_merge.merge_all(states)
    assert torch.equal(out, value.expand(1, 1, 8))
    assert math.isclose(lse.item(), math.log(256), rel_tol=1e-6)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_wrong_merges_are_caught() -> None:
    # requirement B15, X20
    case = make_case(REQUEST)
    right = torch_merge.merge(REQUEST, "cpu")

    def base_two(a: Tensor, la: Tensor, b: Tensor, lb: Tensor) -> Any:
        return right(a, la * math.log(2), b, lb * math.log(2))

    def mean(a: Tensor, la: Tensor, b: Tensor, lb: Tensor) -> Any:
        return (a.nan_to_num() + b.nan_to_num()) / 2, torch.logaddexp(la, lb)

    def plain(a: Tensor, la: Tensor, b: Tensor, lb: Tensor) -> Any:
        lse = torch.logaddexp(la, lb)
        return a * torch.exp(la - lse).unsqueeze(-1) + b * torch.exp(lb - lse).unsqueeze(-1), lse

    for wrong in (base_two, mean, plain):
        assert not all(c.ok for c in case.check(wrong)), wrong.__name__


def test_no_states() -> None:
    with pytest.raises(ValueError, match="give at least one pair"):
        torch_merge.merge_all([])
