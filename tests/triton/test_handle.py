"""The Triton kernels of all phases and the Triton cache write in one handle: plans, and when keys are written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal._attention import Attention
from hal_ops.attention.triton_decode import decode
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_prefill import prefill
from hal_ops.kv_cache.triton_write import write

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32", "page_size": 8}
TABLE = torch.randperm(24, generator=torch.Generator().manual_seed(0)).int().view(4, 6)
WAITS = ("item", "cpu", "tolist", "numpy", "__int__", "__bool__", "__index__", "nonzero")


def handle_of(device: str, **fields: Any) -> Attention:
    """A handle with nothing but Triton's kernels. On the host no device has them, so they are put in by hand."""
    if device != "cpu":
        return hal.get_attention(**{**BASE, **fields}, kernel="triton")
    graph = fields.pop("graph", False)
    found = hal.get_attention(**{**BASE, **fields}, device="cpu")
    request = found.request.replace(graph=graph)
    made = {n: f(request, "cpu") for n, f in (("prefill", prefill), ("extend", extend), ("decode", decode))}
    to_write: Any = found._write_selection
    selection = dataclasses.replace(found.selection, request=request)
    return Attention(selection, made, to_write, write(to_write.request, "cpu"), debug_checks=False)


def tensors(handle: Attention, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, 32, generator=draw).to(handle._torch_device) for heads in (4, 2, 2))
    return q, k, v


def poisoned(handle: Attention) -> hal.KVCache:
    cache = handle.allocate_kv_cache(24)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("fields", [{}, {"kv_layout": "HND", "window": 5}], ids=["NHD", "HND, window"])
def test_prewrite_and_postwrite_agree_in_output_and_cache(
    fields: dict[str, Any], device: str
) -> None:  # requirement B8
    handle = handle_of(device, **fields)
    found = []
    for phase, when in (("prefill", "after"), ("extend", "before")):
        cache, (q, k, v) = poisoned(handle), tensors(handle, 31)
        plan = handle.plan(q_lens=[9, 1, 21], kv_lens=[9, 1, 21], block_table=TABLE[:3], phase=phase)
        assert (plan.phase, plan.write) == (phase, when)
        found.append((handle(q, k, v, cache=cache, plan=plan), cache))
    (after, one), (before, other) = found
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not after.isnan().any()
    for a, b in ((one.k, other.k), (one.v, other.v)):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        assert int((~a.isnan()).flatten(1).any(1).sum()) == 2 + 1 + 3


PHASES = {
    "decode": ([1, 1, 1], [17, 8, 33]),
    "extend": ([3, 8, 1], [17, 8, 33]),
    "prefill": ([17, 8, 33], [17, 8, 33]),
}


@pytest.mark.parametrize("phase", PHASES)
def test_plans_of_host_lengths_wait_for_nothing(phase: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P38
    handle = handle_of(device)
    q_lens, kv_lens = PHASES[phase]
    monkeypatch.setattr(Attention, "_postwrite_pays", lambda self: True)
    rows = TABLE[:3].tolist()

    def synchronises(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan reads a tensor back")

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, synchronises)
    plan = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=rows, max_batch=4, max_tokens=64)
    assert plan.phase == phase
    plan.update(q_lens=q_lens[:2], kv_lens=kv_lens[:2], block_table=rows[:2])


@pytest.mark.parametrize("phase", ["decode", "extend"])
def test_a_table_of_any_strides_names_the_same_pages(phase: str, device: str) -> None:
    handle = handle_of(device)
    q_lens, kv_lens = PHASES[phase]
    cache, (q, _, _) = handle.allocate_kv_cache(24), tensors(handle, sum(q_lens))
    for held in (cache.k, cache.v):
        held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(1)))
    rows = TABLE[:3].to(device)
    columns_first = rows.t().contiguous().t()
    out = [
        handle(q, cache=cache, plan=handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=table))
        for table in (rows, columns_first)
    ]
    assert torch.equal(*out)


def addresses(value: Any, seen: set[int] | None = None) -> list[int]:
    """Of all tensors that a plan holds, its kernel's payload included."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value.data_ptr()]
    if id(value) in seen or isinstance(value, Attention | str | int | float | type(None)):
        return []
    seen.add(id(value))
    if isinstance(value, list | tuple):
        return [a for x in value for a in addresses(x, seen)]
    names = [*getattr(value, "__slots__", ()), *getattr(value, "__dict__", {})]
    return [a for name in names if name != "__weakref__" for a in addresses(getattr(value, name, None), seen)]


STEPS: dict[str, list[tuple[list[int], list[int]]]] = {
    "decode": [([1] * 4, [40, 3, 17, 48]), ([1, 1], [9, 41]), ([1, 1, 1], [1, 8, 33]), ([1] * 4, [48, 48, 1, 2])],
    "extend": [
        ([9, 3, 1, 5], [40, 3, 17, 48]),
        ([2, 7], [9, 41]),
        ([1, 8, 3], [1, 8, 33]),
        ([16], [48]),
        ([1] * 4, [40, 3, 17, 48]),
        ([9, 2, 7], [9, 2, 7]),
        ([1, 1], [1, 1]),
    ],
    "prefill": [([5, 3, 1, 9], [5, 3, 1, 9]), ([2, 7], [2, 7]), ([1] * 4, [1] * 4), ([18], [18]), ([0, 4], [0, 4])],
}


new_empty = Tensor.new_empty


def new_garbage(self: Tensor, *size: Any, **how: Any) -> Tensor:
    """``new_empty`` of memory that holds NaN."""
    made = new_empty(self, *size, **how)
    return made.fill_(torch.nan) if made.is_floating_point() else made


def largest(handle: Attention, phase: str) -> hal.Plan:
    q_lens, kv_lens = STEPS[phase][0]
    sizes = {"max_batch": 4, "max_tokens": 18, "max_pages": 6}
    return handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE, **sizes, phase=phase)


@pytest.mark.parametrize("phase", STEPS)
def test_a_plan_of_maximum_size_serves_smaller_steps_in_place(
    phase: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P37, E12
    handle = handle_of(device, graph=True)
    plan = largest(handle, phase)
    before, cache, other = addresses(plan), handle.allocate_kv_cache(24), handle.allocate_kv_cache(24)
    assert len(before) > 6, "nothing of the kernel's own"
    for k, held in ((7, cache), (7, other)):
        for x in (held.k, held.v):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(k)))
    plain = handle_of(device)
    for seed, (q_lens, kv_lens) in enumerate(STEPS[phase]):
        plan.update(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE[: len(q_lens)])
        assert plan.phase == phase
        assert addresses(plan) == before
        tokens, (q, k, v) = sum(q_lens), tensors(handle, 18, seed)
        with monkeypatch.context() as poison:
            poison.setattr(Tensor, "new_empty", new_garbage)
            whole = handle(q, k, v, cache=cache, plan=plan)
        found = whole[:tokens]
        assert int(whole[tokens:].ne(0).sum()) == 0, "tokens that belong to no row are not zeros"
        once = plain.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE[: len(q_lens)])
        right = plain(q[:tokens], k[:tokens], v[:tokens], cache=other, plan=once)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        assert torch.equal(cache.k, other.k)
        assert torch.equal(cache.v, other.v)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", STEPS)
def test_a_captured_step_follows_its_plan(phase: str, device: str) -> None:  # requirement E12, P37, X13
    """Captured once with the largest step, in a frozen workspace; replayed with other lengths and smaller batches."""
    handle, plain = handle_of(device, graph=True), handle_of(device)
    plan = largest(handle, phase)
    cache, other = handle.allocate_kv_cache(24), handle.allocate_kv_cache(24)
    three = tensors(handle, 18)
    handle(*three, cache=cache, plan=plan)
    pool = hal.workspace(handle._torch_device)
    pool.freeze()
    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = handle(*three, cache=cache, plan=plan)
        for seed, (q_lens, kv_lens) in enumerate(STEPS[phase]):
            plan.update(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE[: len(q_lens)])
            for held, new in zip(three, tensors(handle, 18, seed), strict=True):
                held.copy_(new)
            cache.k.copy_(other.k)
            cache.v.copy_(other.v)
            out.fill_(torch.nan)
            graph.replay()
            once = plain.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE[: len(q_lens)])
            tokens = sum(q_lens)
            right = plain(*(x[:tokens] for x in three), cache=other, plan=once)
            torch.testing.assert_close(out[:tokens], right, atol=1e-4, rtol=1e-4)
            assert int(out[tokens:].ne(0).sum()) == 0
            assert torch.equal(cache.k, other.k)
            assert torch.equal(cache.v, other.v)
    finally:
        pool.thaw()
