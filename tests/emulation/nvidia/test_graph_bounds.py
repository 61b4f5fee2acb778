"""What a captured graph holds beside tensors: bounds are those of every step that its plan is filled with later.

A replay is the first call made again: with the same tensors, filled anew, and the numbers that it was captured with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from torch import Tensor

import hal
from hal._attention import Attention, for_step
from hal._plan import Buffers, make_step
from hal.errors import InputError
from hal_nvidia import NvidiaPlatform
from hal_nvidia._flashinfer_pool import _idle, _zeroed
from hal_ops.attention import AttentionRequest

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
KERNELS = {k.name: k for k in NvidiaPlatform().kernels() if k.op == "attention" and "graph" in k.fields}
FRESH = [name for name, k in KERNELS.items() if k.phase == "prefill"]
PAGED = [name for name in KERNELS if name not in FRESH]
Lengths = tuple[list[int], list[int]]
FIRST: dict[str, Lengths] = {"extend": ([2, 2], [2, 9]), "decode": ([1, 1], [1, 9])}
LATER: dict[str, list[Lengths]] = {
    "extend": [([37, 1], [60, 5]), ([1, 0, 40], [3, 0, 90]), ([], []), ([3, 1], [3, 1])],
    "decode": [([3, 3], [60, 5]), ([4, 4, 4], [4, 90, 7]), ([], []), ([1], [70])],
}


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    hal.reset()
    yield
    hal.reset()
    _idle.clear()
    _zeroed.clear()


def arch_of(name: str) -> str:
    only = KERNELS[name].platforms["nvidia"].only
    return only[0] if only and "sm_90" not in only else "sm_90"


def handle_of(name: str, *, graph: bool = False, **fields: Any) -> hal.Attention:
    """A handle with this kernel. Cache writes are torch's own, which declares no graphs and has no part in these."""
    phase = KERNELS[name].phase
    sinks = {"sinks": True} if "sink" in name else {}
    drafts = {} if name == "xqa.decode" else {"max_q_len": 4}
    given = {**BASE, **sinks, **drafts, "phases": (phase,), "kernel": {phase: name}, **fields}
    found = hal.get_attention(**given, device=hardware.device_of(arch_of(name)))
    if not graph:
        return found
    request = found.request.replace(graph=True)
    made = {phase: hardware.build(KERNELS[name], request, arch_of(name))}
    selection = dataclasses.replace(found.selection, request=request)
    return Attention(selection, made, found._write_selection, found._write, debug_checks=False)


class Captured:
    """A handle, its plan of the first step, and the call that a graph holds."""

    def __init__(self, name: str, phase: str) -> None:
        self.handle = handle_of(name, graph=True)
        self.extras = {"sinks": torch.randn(4)} if self.handle.request.sinks else {}
        self.most = 12 if phase == "decode" and self.handle.request.max_q_len > 1 else 3 if phase == "decode" else 48
        self.cache = self.handle.allocate_kv_cache(24)
        for held in (self.cache.k, self.cache.v):
            held.copy_(torch.randn(held.shape))
        self.width = 96 // int(self.handle.request.page_size) or 1
        self.table = torch.randperm(3 * self.width).int().view(3, self.width)
        q_lens, kv_lens = FIRST[phase]
        self.plan = self.handle.plan(
            q_lens=q_lens, kv_lens=kv_lens, block_table=self.table[:2], max_batch=3, max_tokens=self.most,
            max_pages=self.width,
        )  # fmt: skip
        self.q = torch.zeros(self.most, 4, 64, dtype=torch.bfloat16)
        self.held = self.plan._run, self.plan._step, self.plan._payload

    def fill(self, lengths: Lengths) -> None:
        q_lens, kv_lens = lengths
        self.plan.update(q_lens=q_lens, kv_lens=kv_lens, block_table=self.table[: len(q_lens)])
        self.q.normal_()

    def replay(self) -> Tensor:
        run, step, payload = self.held
        out: Tensor = run(self.q, self.cache.k, self.cache.v, step, payload, **self.extras)
        return out

    def right(self, name: str, lengths: Lengths) -> Tensor:
        request = self.handle.request
        plain = handle_of(name, page_size=request.page_size, kv_layout=request.kv_layout)
        plan = plain.plan(q_lens=lengths[0], kv_lens=lengths[1], block_table=self.table[: len(lengths[0])])
        out: Tensor = plain(self.q[: sum(lengths[0])], cache=self.cache, plan=plan, **self.extras)
        return out


@pytest.mark.parametrize("name", PAGED)
def test_a_graph_captured_with_short_rows_serves_longer_ones(name: str) -> None:  # requirement E3, E12, P37
    phase = KERNELS[name].phase
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        captured = Captured(name, phase)
        captured.replay()
        for lengths in LATER[phase]:
            alike = set(lengths[0]) <= {1}
            if phase == "decode" and not alike and captured.handle.request.max_q_len == 1:
                continue
            if name == "fa2.decode" and not alike:
                with pytest.raises(InputError, match="make a plan, and a graph, for each q_len"):
                    captured.fill(lengths)
                continue
            captured.fill(lengths)
            out = captured.replay()
            assert out.shape == (captured.most, 4, 64)
            if sum(lengths[0]):
                torch.testing.assert_close(out[: sum(lengths[0])], captured.right(name, lengths), atol=0, rtol=0)


ROUNDED = [name for name in PAGED if "fp8_query" in KERNELS[name].fields]


@pytest.mark.parametrize("name", ROUNDED)
def test_what_lies_past_a_step_has_no_part_in_the_scale_of_its_queries(name: str) -> None:
    # requirement E12, P37, B6
    """Where queries become FP8 with one scale a call: room for more tokens may hold anything, however large."""
    phase = KERNELS[name].phase
    arch = "sm_100" if name == "xqa.decode" else arch_of(name)  # it reads no FP8 cache on sm_90
    with nvidia.running_on(arch, name.partition(".")[0]):
        fp8 = {"kv_dtype": "float8_e4m3fn", "fp8_query": True, "phases": (phase,), "graph": True}
        request = AttentionRequest(**BASE, **fp8, page_size=64, kv_layout="HND", dtype="bfloat16")
        call = hardware.build(KERNELS[name], request, arch)
        step = make_step([1, 1], [20, 9], [[0, 1], [2, 0]], 64, CPU)
        fixed = Buffers(4, 4, 2, CPU, 1 if phase == "decode" else 4).fill(step)
        torch.manual_seed(0)
        caches = [torch.randn(4, 2, 64, 64).to(torch.float8_e4m3fn) for _ in "kv"]
        q, found = torch.randn(4, 4, 64).bfloat16(), []
        for past in (0.0, 1e4, 1e30, torch.inf, torch.nan):
            q[2:] = past
            found.append(call(q, *caches, fixed, call.plan(fixed))[:2])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=0, rtol=0)


def test_a_step_that_a_graph_cannot_serve_changes_nothing() -> None:  # requirement P37
    with nvidia.running("fa2"):
        captured = Captured("fa2.decode", "decode")
        captured.fill(([1, 1], [20, 5]))
        with pytest.raises(InputError, match=r"q_len 2, and the plan was made for 1"):
            captured.fill(([2, 2], [20, 5]))
        assert captured.plan._step.q_lens == (1, 1, 0)
        torch.testing.assert_close(captured.replay()[:2], captured.right("fa2.decode", ([1, 1], [20, 5])))
        eager = handle_of("fa2.decode")
        plan = eager.plan(q_lens=[1], kv_lens=[5], block_table=[[0]], max_batch=2)
        assert plan.update(q_lens=[3], kv_lens=[5], block_table=[[0]]).num_tokens == 3


def prefill_of(name: str, **fields: Any) -> Callable[..., Any]:
    heads = {"num_kv_heads": 4} if name == "sdpa_efficient.prefill" else {}
    request = AttentionRequest(**{**BASE, **heads, **fields}, phases=("prefill",))
    made: Callable[..., Any] = hardware.build(KERNELS[name], request, arch_of(name))
    return made


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("fields", [{}, {"return_lse": True}, {"head_dim": 128, "causal": False}], ids=str)
def test_a_prefill_captured_with_short_rows_serves_longer_ones(name: str, fields: dict[str, Any]) -> None:
    # requirement E12, P37, B8
    if "return_lse" in fields and "return_lse" not in KERNELS[name].fields:
        pytest.skip("it has no LSE")
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        heads = 4 if name == "sdpa_efficient.prefill" else 2
        dim = fields.get("head_dim", 64)
        q, k, v = (torch.randn(48, n, dim).bfloat16() for n in (4, heads, heads))
        most = Buffers(4, 48, 3, CPU, 48)
        extras = {"return_lse": True} if "return_lse" in fields else {}
        captured = for_step(prefill_of(name, graph=True, **fields), most.fill(made_step([2, 2])))
        captured(q, k, v, **extras)
        plain = prefill_of(name, **fields)
        for q_lens in ([37, 1], [1, 0, 40], [], [1, 0, 1], [1, 1, 1, 1], [12] * 4):
            step, count = made_step(q_lens), sum(q_lens)
            most.fill(step)
            for x in (q, k, v):
                x[:count].normal_()
                x[count:] = torch.nan  # room may hold anything
            found = captured(q, k, v, **extras)
            if not count:
                continue
            right = for_step(plain, step)(q[:count], k[:count], v[:count], **extras)
            pairs = zip(found, right, strict=True) if extras else [(found, right)]
            for mine, wanted in pairs:
                assert mine.shape[0] == 48
                torch.testing.assert_close(mine[:count], wanted, atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in FRESH if "qkv_dtype" in KERNELS[name].fields])
def test_a_captured_prefill_of_fp8_has_nothing_of_what_lies_past_its_step(name: str) -> None:
    # requirement E12, P37, D15
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        call = prefill_of(name, graph=True, qkv_dtype="float8_e4m3fn", head_dim=128)
        step = Buffers(4, 48, 3, CPU, 48).fill(made_step([7, 20]))
        three = [torch.randn(48, heads, 128).to(torch.float8_e4m3fn) for heads in (4, 2, 2)]
        found = []
        for past in (0x00, 0x7E, 0x7F):  # zero, the largest number, NaN
            for x in three:
                x[27:].view(torch.uint8).fill_(past)
            found.append(for_step(call, step)(*three)[:27])
        assert not found[0].isnan().any()
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=0, rtol=0)


def made_step(q_lens: list[int]) -> Any:
    return make_step(q_lens, q_lens, torch.zeros(len(q_lens), 3, dtype=torch.int32), 16, CPU)
