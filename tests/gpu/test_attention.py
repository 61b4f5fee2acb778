"""On real hardware: attention through the front door, against the float32 reference on the host."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

import hal
from hal_ops.attention import PHASES

pytestmark = pytest.mark.gpu

BASE: dict[str, Any] = {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}


def on_host(**request: Any) -> Any:
    return hal.get_attention(**{**BASE, **request, "dtype": "float32", "device": "cpu", "kernel": "reference"})


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert not out.isnan().any()
    return float((out.float().cpu() - expected).norm() / expected.norm())


BOUND = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("feature", [{}, {"window": 128}, {"softcap": 20.0}, {"causal": False}])
def test_dense(dtype: torch.dtype, feature: dict[str, Any]) -> None:  # requirement B13, D4, X12
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, heads, 64).to(dtype) for heads in (14, 2, 2))
    handle = hal.get_attention(**BASE, **feature, dtype=dtype)
    assert handle.device.platform != "cpu"
    out = handle(*(x.to(handle.device.torch_device()) for x in (q, k, v)))
    assert error(out, on_host(**feature)(q.float(), k.float(), v.float())) < BOUND[dtype]


@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN"])
def test_a_sequence_in_chunks_equals_the_whole(layout: str) -> None:  # requirement B9, D7, D15, A5, D1
    torch.manual_seed(0)
    handle = hal.get_attention(**BASE, dtype="float16", kv_layout=layout)
    device = handle.device.torch_device()
    q, k, v = (torch.randn(33, heads, 64).half() for heads in (14, 2, 2))
    cache = handle.allocate_kv_cache(5)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    bounds = [0, 9, 15, 16, 17, 25, 33]
    pieces = []
    for a, b in itertools.pairwise(bounds):
        plan = handle.plan(q_lens=[b - a], kv_lens=[b], block_table=[[4, 0, 2]])
        pieces.append(handle(*(x[a:b].to(device) for x in (q, k, v)), cache=cache, plan=plan))
    expected = on_host()(*(x.float()[None] for x in (q, k, v)))[0]
    assert error(torch.cat(pieces), expected) < BOUND[torch.float16]


def test_the_reproducer_of_short_pages() -> None:  # requirement D2, D4
    """14 query heads, 2 kv heads, dim 64, pages of 16, 9 keys, 8 queries, fp16."""
    torch.manual_seed(0)
    handle = hal.get_attention(**BASE, dtype="float16")
    device = handle.device.torch_device()
    q, k, v = (torch.randn(9, heads, 64).half() for heads in (14, 2, 2))
    cache = handle.allocate_kv_cache(2)
    first = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[1]])
    handle(*(x[:1].to(device) for x in (q, k, v)), cache=cache, plan=first)
    plan = handle.plan(q_lens=[8], kv_lens=[9], block_table=[[1]])
    out = handle(*(x[1:].to(device) for x in (q, k, v)), cache=cache, plan=plan)
    expected = on_host()(*(x.float()[None] for x in (q, k, v)))[0, 1:]
    assert (out.float().cpu() - expected).abs().max() < 0.01


@pytest.mark.parametrize("scale", ["tensor", "head"])
def test_an_fp8_cache(scale: str) -> None:  # requirement B6, B7, D12, P29
    torch.manual_seed(0)
    handle = hal.get_attention(**BASE, dtype="bfloat16", kv_dtype="fp8", kv_scale=scale)
    device = handle.device.torch_device()
    q, k, v = (torch.randn(20, heads, 64).bfloat16() for heads in (14, 2, 2))
    scales = (0.5, 2.0) if scale == "tensor" else ([0.5, 2.0], [2.0, 0.25])
    cache = handle.allocate_kv_cache(2, k_scale=scales[0], v_scale=scales[1])
    plan = handle.plan(q_lens=[20], kv_lens=[20], block_table=[[1, 0]])
    out = handle(*(x.to(device) for x in (q, k, v)), cache=cache, plan=plan)
    assert out.dtype == torch.bfloat16
    assert error(out, on_host()(*(x.float()[None] for x in (q, k, v)))[0]) < 0.08


def test_sinks_lse_and_merging() -> None:  # requirement B15
    torch.manual_seed(0)
    request = {**BASE, "causal": False, "return_lse": True, "sinks": True}
    handle = hal.get_attention(**request, dtype="bfloat16")
    device = handle.device.torch_device()
    q, k, v = (torch.randn(1, 40, heads, 64).bfloat16() for heads in (14, 2, 2))
    sinks = torch.randn(14)
    out, lse = handle(*(x.to(device) for x in (q, k, v)), sinks=sinks.to(device), return_lse=True)
    host = on_host(causal=False, return_lse=True, sinks=True)
    expected, expected_lse = host(q.float(), k.float(), v.float(), sinks=sinks, return_lse=True)
    assert error(out, expected) < BOUND[torch.bfloat16]
    assert (lse.cpu() - expected_lse).abs().max() < 0.02
    merged, _ = hal.merge_attention_states(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    torch.testing.assert_close(merged, out)


def test_the_reference_is_chosen_only_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:  # requirement R5, X11
    """With every other kernel disabled the reference serves, and says why nothing better did."""
    hal.reset()
    others = sorted(
        {k.library for k in hal._plugins.registry().kernels.values() if k.op == "attention"} - {"reference"}
    )
    with caplog.at_level(logging.WARNING, "hal"), hal.override(disable=others):
        handle = hal.get_attention(**BASE, dtype="bfloat16")
        assert handle.device.platform != "cpu"
    assert {handle.kernels()[p] for p in PHASES} == {f"reference.{p}" for p in PHASES}
    assert "runs on the slow reference kernel reference.decode" in caplog.text
    q, k, v = (torch.randn(1, 8, heads, 64, device=handle.device.torch_device()).bfloat16() for heads in (14, 2, 2))
    expected = on_host()(*(x.float().cpu() for x in (q, k, v)))
    assert error(handle(q, k, v), expected) < BOUND[torch.bfloat16]


def test_host_and_device_mistakes_are_caught_before_a_launch() -> None:
    handle = hal.get_attention(**BASE, dtype="bfloat16")
    device = handle.device.torch_device()
    q, k, v = (torch.randn(1, 8, heads, 64, device=device).bfloat16() for heads in (14, 2, 2))
    handle(q, k, v)
    with pytest.raises(hal.errors.InputError, match="k is on cpu"):
        handle(q, k.cpu(), v)
    with pytest.raises(hal.errors.InputError, match=r"q is torch\.float16"):
        handle(q.half(), k, v)
