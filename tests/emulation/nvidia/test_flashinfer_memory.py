"""What flashinfer's functions work in: who shares it, who counts on zeros in it, and what graphs keep to themselves."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from emulated.flashinfer_memory import FRONT, partial_results, statistics
from emulated.library import Installed

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._flashinfer_memory import Memory
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import AttentionCase, make_case

pytestmark = pytest.mark.usefixtures("own_pool")

CPU = torch.device("cpu")
OLD, NEW = "0.6.13", "0.7.4"
"""The last version that keeps trtllm-gen's counters in its work buffer, and one that does not."""
SHARING = {
    OLD: ("trtllm_gen.extend", "trtllm_gen.decode", "xqa.decode"),
    NEW: ("flashinfer_cudnn.decode", "xqa.decode", "trtllm_gen.extend", "trtllm_gen.decode", "flashinfer_cudnn.extend"),
}
GRAPHS = ("trtllm_gen.extend", "trtllm_gen.decode", "xqa.decode")


@contextlib.contextmanager
def running(version: str) -> Iterator[Installed]:
    with nvidia.running_on("sm_100", "trtllm_gen", version) as held:
        assert held is not None
        yield held


def made(name: str, **fields: Any) -> tuple[AttentionCase, Any]:
    phase = name.partition(".")[2]
    lse = {"return_lse": True} if name.startswith("trtllm_gen") else {}
    given = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "kv_layout": "HND", **lse, **fields}
    request = AttentionRequest(**given, phases=(phase,))
    return make_case(request, phase), hardware.build(name, request, "sm_100")


@pytest.mark.parametrize("version", SHARING)
def test_functions_of_other_rules_do_not_share_a_buffer(version: str) -> None:  # requirement C3, C5
    """On one stream, in turns: what one leaves in its buffer, none finds that counts on zeros."""
    with running(version):
        calls = [made(name) for name in SHARING[version]]
        for _ in range(2):
            for case, paged in calls:
                assert all(comparison.ok for comparison in case.check(paged)), case.label
        step = calls[0][0].args[3]
        buffers = {paged.plan(step).buffer.data_ptr() for _, paged in calls}
        assert len(buffers) == 2, "one with zeros and one without, whoever they are for"


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_plan_for_graphs_has_memory_of_its_own(name: str, version: str) -> None:  # requirement C3, E12, P37
    """A replay may run beside an eager call, or beside another graph's."""
    with running(version):
        _, eager = made(name)
        case, paged = made(name, graph=True)
        step = case.args[3]
        plans = [eager.plan(step), paged.plan(step), paged.plan(step)]
        for field in ("buffer", "counters"):
            held = [getattr(plan, field) for plan in plans]
            assert len({x.data_ptr() for x in held if x is not None}) in (0, 3)
        assert plans[1].buffer.numel() < plans[0].buffer.numel(), "as large as it needs, once a plan"
        assert paged.update(step, plans[1]) is plans[1], "graphs hold its addresses"
        assert all(comparison.ok for comparison in case.check(paged))
        assert [owner for owner in hal.workspace(CPU)._buffers if "flashinfer" in owner]


@pytest.mark.parametrize("name", ["trtllm_gen.extend", "trtllm_gen.decode"])
def test_counters_are_made_once_and_passed_where_there_is_a_parameter(name: str, monkeypatch: Any) -> None:
    # requirement B10, A4
    for version, counted in ((OLD, False), ("0.6.15.post1", True), (NEW, True)):
        with running(version) as held:
            case, paged = made(name)
            plans = [paged.plan(case.args[3]) for _ in range(2)]
            assert all(comparison.ok for comparison in case.check(paged))
            monkeypatch.setattr(pool, "stream_of", lambda device: 77)
            other = paged.plan(case.args[3])
            monkeypatch.undo()
        calls = [c for c in held.calls if "trtllm_batch" in c.function]
        passed = [c.passed.get("multi_ctas_kv_counter_buffer") for c in calls]
        assert passed
        assert all(x is (plans[0].counters if counted else None) for x in passed)
        assert plans[0].counters is plans[1].counters
        assert (other.counters is plans[0].counters) == (not counted), "calls on two streams may overlap"


def step_of(batch: int, max_q_len: int) -> Any:
    return types.SimpleNamespace(batch=batch, max_q_len=max_q_len)


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("graph", [False, True])
def test_memory_suits_the_largest_statistics_and_all_rows(version: str, graph: bool) -> None:
    with running(version):
        for name in ("trtllm_gen.extend", "trtllm_gen.decode"):
            _, paged = made(name, graph=graph)
            for batch, longest in ((1, 1), (300, 4096), (70000, 1)):
                memory: Memory = paged.plan(step_of(batch, longest))
                front = FRONT if version == OLD and name == "trtllm_gen.decode" else 0
                splits = partial_results(128) if name == "trtllm_gen.decode" else 0
                assert memory.buffer.numel() > front + statistics(6, batch, longest, True) + splits
                if memory.counters is not None:
                    assert memory.counters.numel() >= 4 * batch * 6
                    assert not memory.counters.any()


def test_a_buffer_that_grows_is_zero_at_the_front_again() -> None:
    first = pool.zeroed(CPU, 7)
    first.fill_(1)
    assert pool.zeroed(CPU, 7) is first, "its functions leave zeros themselves"
    assert pool.zeroed(CPU, 7, first.numel()) is first
    second = pool.zeroed(CPU, 7, first.numel() + 1)
    assert second.numel() > first.numel()
    assert not second[: pool.ZEROED].any()
    hal.workspace(CPU)._buffers.clear()
    third = pool.zeroed(CPU, 7)
    assert not third[: pool.ZEROED].any()
    assert pool.counters(CPU, 7, 64) is not pool.counters(CPU, 8, 64)
    assert not pool.counters(CPU, 7, 64).any()


@pytest.mark.parametrize("buffer_of", [pool.for_functions, pool.zeroed])
def test_streams_do_not_share_what_functions_work_in(buffer_of: Any) -> None:  # requirement C3
    """Calls on two streams may overlap."""
    assert buffer_of(CPU, 7) is buffer_of(CPU, 7)
    assert buffer_of(CPU, 7) is not buffer_of(CPU, 8)
