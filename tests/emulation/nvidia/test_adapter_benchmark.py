"""``benchmarks/adapters.py`` over emulated libraries: every adapter is measured, against the call that it makes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia

import hal
from hal_nvidia import NvidiaPlatform
from hal_nvidia._flashinfer_pool import _idle, _zeroed

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("adapters")
    for name in ("adapters", "adapter_pairs", "by_hand"):
        sys.modules.pop(name, None)
    _idle.clear()
    _zeroed.clear()


def running(kernel: hal.Kernel, arch: str) -> contextlib.AbstractContextManager[Any]:
    if kernel.op != "mla_attention":
        return nvidia.running_on(arch, kernel.library)
    if kernel.library == "fa3":
        return nvidia.running("fa3", libraries=nvidia.MLA)
    return nvidia.running_on(arch, kernel.library, "0.6.13")


def measured() -> list[Any]:
    """Kernels with an arch of theirs, Hopper where they have it."""
    found = []
    for kernel in NvidiaPlatform().kernels():
        archs = kernel.platforms["nvidia"].only or ("sm_90",)
        found.append(pytest.param(kernel, "sm_90" if "sm_90" in archs else archs[0], id=kernel.name))
    return found


def hard_states() -> list[torch.Tensor]:
    """States without keys among them: of one, of the other, of both; they hold NaN."""
    out_a, out_b = (torch.randn(4, 8, 128).bfloat16() for _ in "ab")
    lse_a, lse_b = torch.randn(4, 8), torch.randn(4, 8)
    for rows, out, lse in ((slice(0, 2), out_a, lse_a), (slice(1, 3), out_b, lse_b)):
        out[rows], lse[rows] = torch.nan, -torch.inf
    return [out_a, lse_a, out_b, lse_b]


def hard_slots(slots: list[int]) -> list[torch.Tensor]:
    return [*torch.randn(2, 4, 8, 128).bfloat16(), *torch.zeros(2, 4, 16, 8, 128).bfloat16(), torch.tensor(slots)]


HARD: dict[str, Any] = {
    "flashinfer.rotary_embedding": lambda: [
        *torch.randn(2, 4, 8, 128).bfloat16(), *torch.rand(2, 16, 64), torch.tensor([15, 0, 0, 7])
    ],
    "flashinfer.kv_cache_write": lambda: hard_slots([-1, 63, 5, -1]),
    "flashinfer.merge_attention_states": hard_states,
}  # fmt: skip
"""Inputs for which the library's function alone is not the op, or reads where nothing is."""


@pytest.mark.parametrize("name", HARD)
def test_what_is_written_by_hand_is_the_op(name: str, benchmark: ModuleType) -> None:
    """The direct call does all that the adapter does: its results, and what it writes."""
    import by_hand

    assert set(by_hand.BY_HAND) == set(HARD)
    with nvidia.running_on("sm_90", "flashinfer"):
        request = importlib.import_module("adapter_pairs")._request(hardware.kernel_named(name))
        calls = by_hand.BY_HAND[name](request), hardware.build(name, request)
        torch.manual_seed(0)
        inputs = HARD[name]()
        direct, adapter = ((call(*mine), mine) for call in calls for mine in [[x.clone() for x in inputs]])
    torch.testing.assert_close(direct, adapter, atol=0, rtol=0, equal_nan=True)


def test_by_hand_all_slots_may_be_skipped(benchmark: ModuleType) -> None:
    import by_hand

    request = importlib.import_module("adapter_pairs")._request(hardware.kernel_named("flashinfer.kv_cache_write"))
    with nvidia.running_on("sm_90", "flashinfer"):
        mine = hard_slots([-1, -1, -1, -1])
        by_hand.kv_cache_write(request)(*mine)
    assert not any(cache.any() for cache in mine[2:4])


@pytest.mark.parametrize(("kernel", "arch"), measured())
def test_every_adapter_is_measured_against_its_own_call(kernel: hal.Kernel, arch: str, benchmark: ModuleType) -> None:
    with running(kernel, arch):
        found = list(benchmark.pairs(hardware.device_of(arch), kernel.name))
        assert len(found) == (2 if kernel.phase == "prefill" or kernel.name in HARD else 1)
        for name, direct, adapter in found:
            straight, adapted = (x[0] if isinstance(x, tuple) else x for x in (direct(), adapter()))
            if straight is not None:
                assert straight.numel() == adapted.numel(), name
                torch.testing.assert_close(straight.float().sum(), adapted.float().sum(), atol=1e-2, rtol=1e-3)
            figures = benchmark.in_turns(direct, adapter, loops=1, rounds=2)
            assert figures["ratio"] > 0
            assert figures["spread"] >= 0


def test_the_table_says_what_is_over_the_budget_and_what_is_noise(benchmark: ModuleType) -> None:
    text = benchmark.table(
        {
            "fa3.decode": {"direct": 20.0, "adapter": 21.5, "added": 1.5, "spread": 0.25, "ratio": 1.075},
            "fa4.prefill dense": {"direct": 30.0, "adapter": 33.0, "added": 3.0, "spread": 1.5, "ratio": 1.1},
            "fa4.decode": {"direct": 108.7, "adapter": 122.2, "added": 1.4, "spread": 12.0, "ratio": 1.12},
            "xqa.decode": {"direct": 50.0, "adapter": 53.0, "added": 2.5, "spread": 2.0, "ratio": 1.06},
        }
    )
    assert text.splitlines() == [
        "call                direct us  adapter us  added us  spread us  ratio",
        "fa3.decode              20.00       21.50     +1.50       0.25   1.07",
        "fa4.prefill dense       30.00       33.00     +3.00       1.50   1.10  over 2 us",
        "fa4.decode             108.70      122.20     +1.40      12.00   1.12  noisy",
        "xqa.decode              50.00       53.00     +2.50       2.00   1.06  over 2 us, noisy",
        "2 of 4 within 2 us",
    ]


def test_a_function_that_is_not_the_op_alone_is_shown_and_not_counted(benchmark: ModuleType) -> None:
    whole = {"direct": 58.0, "adapter": 59.0, "added": 1.0, "spread": 1.0, "ratio": 1.02}
    alone = {"direct": 9.0, "adapter": 59.0, "added": 50.0, "spread": 1.0, "ratio": 6.56}
    name = "flashinfer.kv_cache_write"
    text = benchmark.table({name: whole, name + benchmark.ALONE: alone})
    assert text.splitlines()[1:] == [
        "flashinfer.kv_cache_write                       58.00       59.00     +1.00       1.00   1.02",
        "flashinfer.kv_cache_write, function alone        9.00       59.00    +50.00       1.00   6.56  own launches",
        "1 of 1 within 2 us",
    ]


def test_the_spread_is_that_of_the_paired_differences(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow moment that meets both calls of a round alike is no noise; one that meets a single call is."""
    rounds = [(10.0, 11.0), (50.0, 51.0), (10.0, 11.0), (10.0, 19.0), (10.0, 13.0)]
    given = iter([0.0] * 6 + [x for pair in rounds for x in pair])
    monkeypatch.setattr(benchmark, "microseconds", lambda call, loops: next(given))
    figures = benchmark.in_turns(lambda: None, lambda: None, rounds=len(rounds))
    assert figures == {"direct": 10.0, "adapter": 13.0, "added": 1.0, "spread": 2.0, "ratio": 1.3}


def test_what_is_kept_says_where_it_was_measured(benchmark: ModuleType) -> None:
    kept = benchmark.report(hardware.device_of("sm_90"), {})
    assert kept["device"]["arch"] == "sm_90"
    assert set(kept) == {"device", "python", "libraries", "budget_us", "command", "us"}
