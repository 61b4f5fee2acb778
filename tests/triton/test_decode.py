"""Decode in Triton against the reference: the corners of what it declares, poisoned caches, splits, plans, graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import indicator_case, make_case, visible_keys
from hal_ops.attention.paged_inputs import make_step
from hal_ops.attention.reference import decode as reference
from hal_ops.attention.triton_decode import decode


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "page_size": 16}
    return AttentionRequest(**{**base, "kv_layout": "NHD", **fields})


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "group 1": {"num_q_heads": 2},
    "group 3": {"num_q_heads": 3, "num_kv_heads": 1},
    "group 5": {"num_q_heads": 10},
    "group 7": {"num_q_heads": 14},
    "group 12": {"num_q_heads": 12, "num_kv_heads": 1},
    "group 24": {"num_q_heads": 24, "num_kv_heads": 1},
    "head_dim 32": {"head_dim": 32},
    "head_dim 80": {"head_dim": 80, "return_lse": True},
    "head_dim 96": {"head_dim": 96},
    "head_dim 112": {"head_dim": 112},
    "head_dim 128": {"head_dim": 128},
    "head_dim 192/128": {"head_dim": 192, "v_head_dim": 128},
    "head_dim 256": {"head_dim": 256, "num_q_heads": 2, "num_kv_heads": 1},
    "head_dim 40/24": {"head_dim": 40, "v_head_dim": 24},
    "page 1": {"page_size": 1},
    "page 8, HND": {"page_size": 8, "kv_layout": "HND"},
    "page 48": {"page_size": 48},
    "page 64": {"page_size": 64},
    "page 256, HND": {"page_size": 256, "kv_layout": "HND"},
    "HDN": {"kv_layout": "HDN", "return_lse": True},
    "HDN, page 128, 4 queries": {"kv_layout": "HDN", "page_size": 128, "max_q_len": 4, "window": 20},
    "HDN, page 48, heads of 80/24": {"kv_layout": "HDN", "page_size": 48, "head_dim": 80, "v_head_dim": 24},
    "HDN, float8_e4m3fn a head": {"kv_layout": "HDN", "kv_dtype": "float8_e4m3fn", "kv_scale": "head"},
    "4 queries": {"max_q_len": 4, "return_lse": True},
    "4 queries, bidirectional": {"max_q_len": 4, "causal": False},
    "16 queries of group 8": {"max_q_len": 16, "num_q_heads": 8, "num_kv_heads": 1, "return_lse": True},
    "window 1": {"window": 1},
    "window 17": {"window": 17, "return_lse": True},
    "window, 3 queries": {"window": 7, "max_q_len": 3},
    "window, both sides": {"window": (6, 2), "max_q_len": 5, "causal": False},
    "window, page 64": {"window": 5, "page_size": 64},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True, "return_lse": True},
    "alibi": {"alibi": True, "max_q_len": 2},
    "scale": {"softmax_scale": 0.3},
    "everything": {
        "softcap": 30.0, "sinks": True, "alibi": True, "window": 20, "max_q_len": 3, "return_lse": True,
        "num_q_heads": 6, "head_dim": 80, "page_size": 8, "kv_layout": "HND", "softmax_scale": 0.2,
    },
    "float8_e4m3fn": {"kv_dtype": "float8_e4m3fn", "return_lse": True},
    "float8_e5m2 a head": {"kv_dtype": "float8_e5m2", "kv_scale": "head", "kv_layout": "HND"},
}  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_right(corner: str, device: str, assert_right: Callable[[Any], None]) -> None:
    # requirement D1, D3, D4, D6, D15, B6, B13, B15, B16, E8
    request = request_of(**CORNERS[corner])
    case = make_case(request, "decode", device=device)
    assert_right(case.check(decode(request, device)))


@pytest.mark.parametrize("scale", ["large", "outliers"])
@pytest.mark.parametrize("fields", [{}, {"softcap": 30.0}, {"dtype": "float32"}, {"kv_dtype": "float8_e4m3fn"}])
def test_large_numbers_are_right(
    scale: str, fields: dict[str, Any], device: str, assert_right: Callable[[Any], None]
) -> None:
    request = request_of(**fields)
    assert_right(make_case(request, "decode", device=device, scale=scale).check(decode(request, device)))


def test_views_of_one_tensor_are_right(device: str, assert_right: Callable[[Any], None]) -> None:
    for layout in ("NHD", "HND", "HDN"):
        request = request_of(kv_layout=layout)
        case = make_case(request, "decode", device=device, interleaved=True)
        assert_right(case.check(decode(request, device)))


def test_the_reproducer_of_short_paged_rows(device: str, assert_right: Callable[[Any], None]) -> None:
    # requirement D2, D5
    request = request_of(num_q_heads=14, num_kv_heads=2, max_q_len=8)
    lengths = [(8, n) for n in (9, 15, 16, 17, 25, 33, 8, 200)]
    assert_right(make_case(request, "decode", device=device, lengths=lengths).check(decode(request, device)))


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 1},
        {"window": 16},
        {"window": 128},
        {"window": (9, None), "causal": False, "max_q_len": 4},
        {"window": (None, 1), "causal": False, "max_q_len": 6},
        {"window": (0, 0), "max_q_len": 3},
        {"max_q_len": 7},
    ],
)
def test_exactly_the_keys_of_the_mask_are_seen(fields: dict[str, Any], device: str) -> None:  # requirement E8
    request = request_of(num_q_heads=2, num_kv_heads=1, head_dim=256, dtype="float32", **fields)
    lengths = [(request.max_q_len, n) for n in (8, 127, 128, 129, 250)]
    case = indicator_case(request, "decode", device=device, lengths=lengths)
    out = case.call(decode(request, device))["out"].cpu()
    seen = visible_keys(case)
    assert torch.equal(out > 0, seen.unsqueeze(1).expand(out.shape))


def many_splits(request: AttentionRequest, device: str, slots: int = 40) -> Any:
    """An implementation that cuts rows in pieces of one block."""
    impl: Any = decode(request, device)
    impl.cut = dataclasses.replace(impl.cut, target=slots * impl.cut.programs, slots=1 << 20)
    return impl


@pytest.mark.parametrize(
    "fields",
    [
        {"return_lse": True},
        {"sinks": True, "return_lse": True, "num_q_heads": 14},
        {"window": 150, "max_q_len": 3, "head_dim": 80},
        {"num_q_heads": 24, "num_kv_heads": 1, "max_q_len": 4},
        {"page_size": 256, "kv_layout": "HND", "head_dim": 32},
    ],
)
def test_splits_are_merged(fields: dict[str, Any], device: str, assert_right: Callable[[Any], None]) -> None:
    request = request_of(**fields)
    q_len = request.max_q_len
    case = make_case(request, "decode", device=device, lengths=[(q_len, n) for n in (400, q_len, 33, 170)])
    impl = many_splits(request, device)
    work = impl._work(case.args[3])
    assert work.slots > 4, "nothing is split"
    assert_right(case.check(impl))


def test_one_payload_serves_many_calls_with_the_same_bits(device: str) -> None:  # requirement D14
    request = request_of()
    case = make_case(request, "decode", device=device, lengths=[(1, n) for n in (400, 90, 1)])
    impl = many_splits(request, device)
    payload = impl.plan(case.args[3])
    first, *others = (impl(*case.args, payload) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
    assert int(payload.counters.abs().sum()) == 0


def test_batch_invariance(device: str) -> None:  # requirement D14
    """With ``deterministic=True`` a row's bits do not depend on the rows beside it; else they may."""
    request = request_of(deterministic=True)
    lengths = [(1, n) for n in (1300, 40, 600, 1)]
    case = make_case(request, "decode", device=device, lengths=lengths)
    impl: Any = decode(request, device)
    q, k, v, step = case.args
    together = impl(*case.args, impl.plan(step))
    for row in range(4):
        alone = make_step([1], [lengths[row][1]], step.block_table[row : row + 1].cpu(), 16, device)
        out = impl(q[row : row + 1], k, v, alone, impl.plan(alone))
        assert torch.equal(out[0], together[row])


def test_plans_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:  # requirement P38
    request = request_of(max_q_len=2)
    case = make_case(request, "decode", device=device)
    impl: Any = decode(request, device)

    def synchronises(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan reads a tensor back")

    for name in ("item", "cpu", "tolist", "numpy", "__int__", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, synchronises)
    payload = impl.plan(case.args[3])
    impl.update(case.args[3], payload)


def buffers(table: torch.Tensor, tokens: int, device: str) -> Any:
    """A function that makes steps of ``len(table)`` rows in the same memory, as a plan of maximum size does."""
    rows = len(table)
    held: list[Any] = []

    def make(q_lens: list[int], kv_lens: list[int]) -> Any:
        padding = [0] * (rows - len(q_lens))
        new = make_step([*q_lens, *padding], [*kv_lens, *padding], table, 16, device)
        slots = torch.full((tokens,), -1, device=device)
        slots[: len(new.slot_mapping)] = new.slot_mapping
        new = dataclasses.replace(new, slot_mapping=slots, max_kv_len=table.shape[1] * 16)
        if not held:
            held.append(new)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if isinstance(value, torch.Tensor):
                value = getattr(held[0], field.name).copy_(value)
            setattr(held[0], field.name, value)
        return held[0]

    return make


STEPS = [
    ([2] * 4, [250, 33, 2, 90]),
    ([2] * 4, [100, 320, 320, 2]),
    ([2] * 2, [16, 200]),
    ([1] * 3, [1, 320, 5]),
]


def a_cache(request: AttentionRequest, pages: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (pages, 16, request.num_kv_heads, request.head_dim)
    k, v = (torch.randn(shape).to(getattr(torch, request.dtype)).to(device) for _ in "kv")
    return k, v


def addresses(payload: Any) -> list[int]:
    return [x.data_ptr() for x in (payload.work, payload.out, payload.lse, payload.counters)]


def test_a_payload_is_updated_in_place(device: str) -> None:  # requirement E12, P37
    request = request_of(max_q_len=2, graph=True)
    k, v = a_cache(request, 80, device)
    table = torch.randperm(80).int().view(4, 20)
    make = buffers(table, 8, device)
    impl = many_splits(request, device, slots=12)
    q = torch.randn(8, 4, 64, device=device).half()
    payload = impl.plan(make(*STEPS[0]))
    before = addresses(payload), payload.programs
    for q_lens, kv_lens in STEPS:
        step = make(q_lens, kv_lens)
        assert impl.update(step, payload) is payload
        assert (addresses(payload), payload.programs) == before
        out = impl(q, k, v, step, payload)
        tokens = sum(q_lens)
        right = reference(request, device)(q[:tokens], k, v, step, None)
        torch.testing.assert_close(out[:tokens], right, atol=2e-3, rtol=2e-3)
        assert int(out[tokens:].ne(0).sum()) == 0, "tokens that belong to no row are not zeros"
        torch.testing.assert_close(impl(q[:tokens], k, v, step, payload), out[:tokens], atol=0, rtol=0)


def test_a_step_beyond_the_payload_is_refused_for_graphs(device: str) -> None:  # requirement P37, X13
    table = torch.randperm(60).int().view(6, 10)
    larger = make_step([1] * 6, [150] * 6, table, 16, device)
    for graph in (True, False):
        request = request_of(graph=graph)
        impl = many_splits(request, device, slots=1)
        payload = impl.plan(make_step([1], [16], table[:1], 16, device))
        if graph:
            with pytest.raises(ValueError, match="plan the largest step before the capture"):
                impl.update(larger, payload)
            continue
        k, v = a_cache(request, 60, device)
        q = torch.randn(6, 4, 64, device=device).half()
        out = impl(q, k, v, larger, impl.update(larger, payload))
        torch.testing.assert_close(out, reference(request, device)(q, k, v, larger, None), atol=2e-3, rtol=2e-3)


def test_addresses_that_are_no_multiples_of_sixteen(device: str) -> None:
    request = request_of()
    k, v = a_cache(request, 20, device)
    impl: Any = decode(request, device)
    step = make_step([1, 1], [150, 17], torch.arange(20).int().view(2, 10), 16, device)
    payload = impl.plan(step)
    q = torch.randn(2, 4, 64, device=device).half()
    right = impl(q, k, v, step, payload)
    for offset in (1, 0, 3):
        moved = []
        for x in (q, k, v):
            memory = torch.full((x.numel() + 8,), torch.nan, device=device).half()
            moved.append(memory[offset : offset + x.numel()].view(x.shape).copy_(x))
        torch.testing.assert_close(impl(*moved, step, payload), right)


def test_strides_may_change_from_call_to_call(device: str) -> None:
    request = request_of()
    k, v = a_cache(request, 20, device)
    impl: Any = decode(request, device)
    step = make_step([1, 1], [50, 17], torch.arange(20).int().view(2, 10), 16, device)
    payload = impl.plan(step)
    fused = torch.randn(2, 8, 64, device=device).half()
    both = torch.stack([k, v], 1)
    wide = torch.zeros(20, 16, 2, 96, device=device).half()
    wide[..., :64] = v
    right = reference(request, device)(fused[:, 2:6], k, v, step, None)
    q, dense = fused[:, 2:6], fused[:, 2:6].contiguous()
    for tensors in (
        (q, k, v),
        (dense, k, v),
        (q, k, both[:, 1]),
        (q, both[:, 0], both[:, 1]),
        (q, k, wide[..., :64]),
    ) * 2:
        torch.testing.assert_close(impl(*tensors, step, payload), right, atol=2e-3, rtol=2e-3)


def test_block_tables_may_become_wider_and_move(device: str) -> None:
    """A width of one, and of a multiple of sixteen, are numbers that Triton compiles kernels of their own for."""
    request = request_of(page_size=1)
    k, v = a_cache(request_of(), 8, device)
    k, v = (x.reshape(128, 1, 2, 64) for x in (k, v))
    impl: Any = decode(request, device)
    q = torch.randn(2, 4, 64, device=device).half()
    for width in (1, 16, 17, 33):
        wide = torch.randperm(128)[: 2 * width].int().to(device)
        for table in (wide.view(2, width), torch.cat([wide[:1], wide])[1:].view(2, width)):
            step = make_step([1, 1], [width, 1], table.cpu(), 1, device)
            step.block_table = table
            out = impl(q, k, v, step, impl.plan(step))
            torch.testing.assert_close(out, reference(request, device)(q, k, v, step, None), atol=2e-3, rtol=2e-3)


def test_nothing_to_do(device: str) -> None:
    request = request_of(return_lse=True)
    k, v = a_cache(request, 1, device)
    step = make_step([], [], torch.zeros(0, 1).int(), 16, device)
    impl: Any = decode(request, device)
    out, lse = impl(torch.zeros(0, 4, 64, device=device).half(), k, v, step, impl.plan(step), return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dtype": "float64"}, "does not do dtype float64"),
        ({"kv_dtype": "bfloat16"}, "does not do kv_dtype bfloat16"),
        ({"head_dim": 320}, "head_dim 320, v_head_dim 320"),
        ({"needs_grad": True}, "needs_grad True"),
    ],
)
def test_what_it_does_not_do_is_refused(fields: dict[str, Any], text: str) -> None:  # requirement C7
    with pytest.raises(ValueError, match=text):
        decode(request_of(**fields), "cpu")


def test_tensors_that_the_request_does_not_mention_are_refused(device: str) -> None:  # requirement C7
    case = make_case(request_of(), "decode", device=device)
    impl: Any = decode(case.request, device)
    with pytest.raises(ValueError, match="a tensor for sinks"):
        impl(*case.args, impl.plan(case.args[3]), sinks=torch.zeros(4, device=device))
