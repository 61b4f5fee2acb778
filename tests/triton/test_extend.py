"""Extend in Triton against the reference: the corners of what it declares, poisoned caches, plans, graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops._gpu import gpu_of
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_configs import HOPPER_EXTEND, HOPPER_ROWS, TABLE, WIDE, Config, Hopper
from hal_ops.attention.cases import indicator_case, make_case, visible_keys
from hal_ops.attention.paged_inputs import make_step
from hal_ops.attention.reference import extend as reference
from hal_ops.attention.triton_extend import extend

Check = Callable[[Any], None]


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "page_size": 16}
    return AttentionRequest(**{**base, "kv_layout": "NHD", **fields})


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {"return_lse": True},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bidirectional": {"causal": False},
    "group 1": {"num_q_heads": 2},
    "group 3": {"num_q_heads": 3, "num_kv_heads": 1},
    "group 7": {"num_q_heads": 14, "return_lse": True},
    "group 12": {"num_q_heads": 12, "num_kv_heads": 1},
    "group 24": {"num_q_heads": 24, "num_kv_heads": 1},
    "head_dim 32": {"head_dim": 32},
    "head_dim 80": {"head_dim": 80},
    "head_dim 112": {"head_dim": 112},
    "head_dim 128": {"head_dim": 128},
    "head_dim 192/128": {"head_dim": 192, "v_head_dim": 128, "num_q_heads": 2},
    "head_dim 256": {"head_dim": 256, "num_q_heads": 2, "num_kv_heads": 1},
    "page 1": {"page_size": 1, "return_lse": True},
    "page 2, HND": {"page_size": 2, "kv_layout": "HND"},
    "page 8": {"page_size": 8},
    "page 48": {"page_size": 48},
    "page 64, HND": {"page_size": 64, "kv_layout": "HND"},
    "page 128": {"page_size": 128},
    "page 256, HND": {"page_size": 256, "kv_layout": "HND"},
    "HDN": {"kv_layout": "HDN", "return_lse": True},
    "HDN, page 128": {"kv_layout": "HDN", "page_size": 128, "window": 20},
    "HDN, page 4, heads of 80/48": {"kv_layout": "HDN", "page_size": 4, "head_dim": 80, "v_head_dim": 48},
    "HDN, head_dim 192": {"kv_layout": "HDN", "head_dim": 192, "dtype": "float32", "num_q_heads": 2},
    "HDN, float8_e4m3fn a head": {"kv_layout": "HDN", "kv_dtype": "float8_e4m3fn", "kv_scale": "head"},
    "window 1": {"window": 1},
    "window 17, page 64": {"window": 17, "page_size": 64},
    "window, both sides": {"window": (6, 2), "causal": False},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True, "return_lse": True},
    "alibi": {"alibi": True},
    "everything": {
        "softcap": 30.0, "sinks": True, "alibi": True, "window": 20, "return_lse": True,
        "num_q_heads": 6, "head_dim": 80, "page_size": 8, "kv_layout": "HND", "softmax_scale": 0.2,
    },
    "float8_e4m3fn": {"kv_dtype": "float8_e4m3fn", "return_lse": True},
    "float8_e4m3fn a head": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "softcap": 9.0},
    "float8_e5m2 a head": {"kv_dtype": "float8_e5m2", "kv_scale": "head", "kv_layout": "HND"},
}  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_right(corner: str, device: str, assert_right: Check) -> None:
    # requirement D1, D3, D4, D6, D15, B6, B13, B15, E8
    request = request_of(**CORNERS[corner])
    case = make_case(request, "extend", device=device)
    assert_right(case.check(extend(request, device)))


@pytest.mark.parametrize("fields", [{"kv_dtype": "float8_e4m3fnuz"}, {"page_size": 784}])
def test_what_the_interpreter_alone_can_show(fields: dict[str, Any], interpreted: bool, assert_right: Check) -> None:
    if not interpreted:
        pytest.skip("this GPU does not convert the format, and the other has a test of its own")
    request = request_of(**fields, dtype="float16", num_q_heads=1, num_kv_heads=1)
    lengths = [(3, 20), (1, 5), (30, 790)]
    assert_right(make_case(request, "extend", lengths=lengths).check(extend(request, "cpu")))


@pytest.mark.parametrize("scale", ["large", "outliers"])
@pytest.mark.parametrize("fields", [{}, {"kv_dtype": "float8_e4m3fn"}])
def test_large_numbers_are_right(scale: str, fields: dict[str, Any], device: str, assert_right: Check) -> None:
    request = request_of(**fields)
    assert_right(make_case(request, "extend", device=device, scale=scale).check(extend(request, device)))


def test_views_of_one_tensor_are_right(device: str, assert_right: Check) -> None:
    for layout, size in (("NHD", 16), ("HND", 16), ("NHD", 128), ("HND", 128), ("HDN", 16)):
        request = request_of(kv_layout=layout, page_size=size)
        case = make_case(request, "extend", device=device, interleaved=True)
        assert_right(case.check(extend(request, device)))


def test_the_reproducer_of_short_paged_rows(device: str, assert_right: Check) -> None:  # requirement D2, D5
    request = request_of(num_q_heads=14, num_kv_heads=2)
    lengths = [(8, n) for n in (9, 15, 16, 17, 25, 33, 8)] + [(200, 300)]
    assert_right(make_case(request, "extend", device=device, lengths=lengths).check(extend(request, device)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": False},
        {"window": 1},
        {"window": 128},
        {"window": (9, None), "causal": False},
        {"window": (None, 1), "causal": False},
    ],
)
def test_exactly_the_keys_of_the_mask_are_seen(fields: dict[str, Any], device: str) -> None:  # requirement E8
    request = request_of(num_q_heads=2, num_kv_heads=1, head_dim=256, **fields)
    lengths = [(8, 8), (130, 130), (60, 190), (1, 100), (0, 3)]
    case = indicator_case(request, "extend", device=device, lengths=lengths)
    out = case.call(extend(request, device))["out"].cpu()
    assert torch.equal(out > 0, visible_keys(case).unsqueeze(1).expand(out.shape))


def a_cache(request: AttentionRequest, pages: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (pages, int(request.page_size), request.num_kv_heads, request.head_dim)
    k, v = (torch.randn(shape).to(getattr(torch, request.dtype)).to(device) for _ in "kv")
    return k, v


def test_pages_left_of_the_window_are_not_read(device: str) -> None:  # requirement D15
    request = request_of(window=20)
    k, v = a_cache(request, 20, device)
    table = torch.arange(20).int().view(1, 20)
    step = make_step([10], [310], table, 16, device)
    impl: Any = extend(request, device)
    q = torch.randn(10, 4, 64, device=device).half()
    right = impl(q, k, v, step, impl.plan(step))
    k[:17], v[:17] = torch.nan, torch.inf
    step.block_table[0, :17] = 2**31 - 1
    assert torch.equal(impl(q, k, v, step, impl.plan(step)), right)


def test_chunks_are_right_and_equal_one_shot(device: str) -> None:  # requirement D7, B9
    request = request_of(page_size=32)
    k, v = a_cache(request, 8, device)
    table = torch.randperm(8).int().view(1, 8)
    q = torch.randn(200, 4, 64, device=device).half()
    impl: Any = extend(request, device)

    def attend(first: int, end: int) -> torch.Tensor:
        step = make_step([end - first], [end], table, 32, device)
        return impl(q[first:end], k, v, step, impl.plan(step))

    chunks = torch.cat([attend(first, min(200, first + 70)) for first in range(0, 200, 70)])
    torch.testing.assert_close(chunks, attend(0, 200), atol=1e-3, rtol=1e-3)


def test_the_longest_tiles_come_first(device: str) -> None:
    request = request_of(window=100)
    impl: Any = extend(request, device)
    table = torch.arange(120).int().view(3, 40)
    step = make_step([1, 300, 30], [600, 300, 60], table, 16, device)
    tiles = impl.plan(step).table.cpu()
    keys = [
        min(kv, end) - max(0, kv - q + first - 99) for q, kv, first, end in _ranges(step, tiles, impl.plan(step).tokens)
    ]
    assert keys == sorted(keys, reverse=True)
    assert sorted(tiles[tiles[:, 0] >= 0][:, 0].tolist()).count(1) == -(-300 // impl.plan(step).tokens)


def _ranges(step: Any, tiles: torch.Tensor, tokens: int) -> list[tuple[int, int, int, int]]:
    found = []
    for row, first in tiles.tolist():
        if row >= 0:
            q, kv = step.q_lens[row], step.kv_lens_host[row]
            found.append((q, kv, first, kv - q + min(q, first + tokens)))
    return found


def test_plans_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:  # requirement P38
    case = make_case(request_of(), "extend", device=device)
    impl: Any = extend(case.request, device)

    def synchronises(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan reads a tensor back")

    for name in ("item", "cpu", "tolist", "numpy", "__int__", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, synchronises)
    payload = impl.plan(case.args[3])
    impl.update(case.args[3], payload)


STEPS = [([30, 5, 60], [100, 5, 60]), ([64, 0, 0], [320, 7, 0]), ([1, 2, 3], [300, 17, 3]), ([90, 10, 0], [90, 320, 0])]


def held_steps(device: str) -> Callable[[list[int], list[int]], Any]:
    """Steps of 3 rows and up to 100 tokens in the same memory, as a plan of maximum size makes them."""
    table = torch.arange(60).int().view(3, 20)
    held: list[Any] = []

    def make(q_lens: list[int], kv_lens: list[int]) -> Any:
        new = make_step(q_lens, kv_lens, table, 16, device)
        slots = torch.full((100,), -1, device=device)
        slots[: len(new.slot_mapping)] = new.slot_mapping
        new = dataclasses.replace(new, slot_mapping=slots)
        held.append(new) if not held else None
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            value = getattr(held[0], field.name).copy_(value) if isinstance(value, torch.Tensor) else value
            setattr(held[0], field.name, value)
        return held[0]

    return make


@pytest.mark.parametrize("first", [0, 2], ids=["long rows first", "short rows first"])
def test_a_payload_is_updated_in_place(first: int, device: str) -> None:  # requirement E12, P37
    steps = STEPS[first:] + STEPS[:first]
    request = request_of(graph=True)
    k, v = a_cache(request, 60, device)
    make = held_steps(device)
    impl: Any = extend(request, device)
    q = torch.randn(100, 4, 64, device=device).half()
    payload = impl.plan(make(*steps[0]))
    before = payload.table.data_ptr(), payload.table.shape
    for q_lens, kv_lens in steps:
        step = make(q_lens, kv_lens)
        assert impl.update(step, payload) is payload
        assert (payload.table.data_ptr(), payload.table.shape) == before
        out, tokens = impl(q, k, v, step, payload), sum(q_lens)
        right = reference(request, device)(q[:tokens], k, v, step, None)
        torch.testing.assert_close(out[:tokens], right, atol=2e-3, rtol=2e-3)
        assert int(out[tokens:].ne(0).sum()) == 0, "tokens that belong to no row are not zeros"


def test_tiles_suit_the_rows_there_are_and_not_those_there_may_be(device: str) -> None:
    """The bound on the rows of a plan that a graph holds is that of its buffers."""
    impl: Any = extend(request_of(graph=True), device)
    step = held_steps(device)(*STEPS[2])
    bound = dataclasses.replace(step, max_q_len=100)
    assert impl.plan(bound).block_m == impl.plan(step).block_m


def test_an_update_says_anew_whether_there_are_tokens_of_no_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement E12
    request = request_of(return_lse=True)
    k, v = a_cache(request, 60, device)
    make = held_steps(device)
    impl: Any = extend(request, device)
    q = torch.randn(100, 4, 64, device=device).half()
    payload = impl.plan(make([90, 10, 0], [90, 320, 0]))
    step = make(*STEPS[0])
    impl.update(step, payload)
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **how: real(self, *size, **how).fill_(7))
    out, lse = impl(q, k, v, step, payload, return_lse=True)
    monkeypatch.undo()
    tokens = sum(STEPS[0][0])
    assert bool((out[tokens:] == 0).all())
    assert bool((lse[tokens:] == -torch.inf).all())


def test_nothing_to_do(device: str) -> None:
    request = request_of(return_lse=True)
    k, v = a_cache(request, 1, device)
    step = make_step([], [], torch.zeros(0, 1).int(), 16, device)
    impl: Any = extend(request, device)
    out, lse = impl(torch.zeros(0, 4, 64, device=device).half(), k, v, step, impl.plan(step), return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dtype": "float64"}, "does not do dtype float64"),
        ({"kv_dtype": "bfloat16"}, "does not do kv_dtype bfloat16"),
        ({"head_dim": 320}, "head_dim 320, v_head_dim 320"),
    ],
)
def test_what_it_does_not_do_is_refused(fields: dict[str, Any], text: str) -> None:  # requirement C7
    with pytest.raises(ValueError, match=text):
        extend(request_of(**fields), "cpu")


ARCHS = "gfx" if torch.version.hip else "sm_"
"""Configurations of other vendors' archs are not what is run here."""
CONFIGS: list[Config | Hopper] = [
    *sorted({c for arch in TABLE if arch.startswith(ARCHS) for c in TABLE[arch]}, key=str),
    *dict.fromkeys((*HOPPER_EXTEND, *HOPPER_ROWS)),
    Hopper(128, 128, 64, 2, 24),
]
LENGTHS = [(300, 300), (0, 0), (5, 5), (0, 7), (129, 700), (1, 513), (33, 290), (260, 1000)]


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of Hopper makes several tiles a program, as over long inputs."""
    few = dataclasses.replace(gpu_of("cuda"), multiprocessors=5)
    monkeypatch.setattr("hal_ops.attention.triton_extend.gpu_of", lambda _: few)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("page_size", "layout"), [(16, "NHD"), (64, "HND"), (128, "HND"), (256, "NHD"), (1, "NHD")])
def test_every_configuration_is_right(
    config: Config | Hopper, page_size: int, layout: str, assert_right: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.5 to 3.6 and their ptxas have compiled single configurations wrongly (lmdeploy#4920, fla#1262)."""
    dims = [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]
    dims = [d for d in dims if config.dim // 2 < d[0] <= config.dim or d[0] < config.dim == 128]
    for k_dim, v_dim in dims:
        request = request_of(
            head_dim=k_dim, v_head_dim=v_dim, page_size=page_size, kv_layout=layout, dtype="bfloat16", window=400,
            return_lse=True,
        )  # fmt: skip
        case = make_case(request, "extend", device="cuda", lengths=LENGTHS, oracle="cuda")
        spare = (config,) if isinstance(config, Config) else (config, Config(256, 128, 32, 8, 1))
        assert_right(case.check(extend(request, "cuda", configs=spare)))
        if isinstance(config, Hopper):
            with monkeypatch.context() as several:
                few_programs(several)
                assert_right(case.check(extend(request, "cuda", configs=spare)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kv_dtype", "fp8_query"),
    [("float8_e4m3fn", False), ("float8_e4m3fn", True), ("float8_e5m2", False)],
    ids=["e4m3", "e4m3, q rounded", "e5m2"],
)
@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
@pytest.mark.parametrize("programs", ["few", "all"])
def test_fp8_caches(
    kv_dtype: str, fp8_query: bool, kv_scale: str, programs: str, assert_right: Check, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement B6, B7, D12
    if programs == "few":
        few_programs(monkeypatch)
    for dim, page_size, layout, fields in (
        (64, 16, "NHD", {"dtype": "float16"}),
        (64, 128, "NHD", {"window": 400, "return_lse": True}),
        (80, 16, "NHD", {}),
        (128, 16, "HND", {"sinks": True, "return_lse": True}),
        (128, 64, "NHD", {"softcap": 9.0}),
        (128, 128, "HND", {"causal": False}),
        (256, 16, "NHD", {}),
    ):
        request = request_of(
            head_dim=dim, kv_dtype=kv_dtype, kv_scale=kv_scale, kv_layout=layout, page_size=page_size,
            fp8_query=fp8_query, **{"dtype": "bfloat16", **fields},
        )  # fmt: skip
        for scale in ("normal", "outliers"):
            case = make_case(request, "extend", device="cuda", lengths=LENGTHS, scale=scale, oracle="cuda")
            assert_right(case.check(extend(request, "cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 128])
def test_a_query_is_rounded_whatever_is_beside_it(page_size: int) -> None:  # requirement D14, B7
    """Rows of a tile have a scale each: one of a thousand times the size takes no digits from its neighbours."""
    request = request_of(
        head_dim=128, kv_dtype="float8_e4m3fn", page_size=page_size, dtype="bfloat16", fp8_query=True, kv_layout="NHD"
    )
    case = make_case(request, "extend", device="cuda", lengths=((70, 300), (5, 33)))
    q, *rest = case.args
    attend = extend(request, "cuda")
    plan = attend.plan(case.args[3])
    plain = attend(q, *rest, plan, **case.kwargs)
    large = q.clone()
    large[::2] *= 1000.0
    found = attend(large, *rest, plan, **case.kwargs)
    assert torch.equal(found[1::2], plain[1::2])
    assert not torch.equal(found[::2], plain[::2])
    nothing = q.clone()
    nothing[::2] = 0.0
    found = attend(nothing, *rest, plan, **case.kwargs)
    assert torch.equal(found[1::2], plain[1::2])
    assert found.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", WIDE, ids=str)
def test_float32_is_right(config: Config, assert_right: Check) -> None:
    request = request_of(dtype="float32", head_dim=config.dim, page_size=48, return_lse=True)
    case = make_case(request, "extend", device="cuda", lengths=LENGTHS, oracle="cuda")
    assert_right(case.check(extend(request, "cuda", configs=(config,))))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 128])
def test_pages_past_two_to_the_31_elements(page_size: int) -> None:
    request = request_of(head_dim=128, num_kv_heads=4, dtype="bfloat16", page_size=page_size)
    pages = (1 << 31) // (page_size * 4 * 128) + 8
    k = torch.zeros(pages, page_size, 4, 128, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    k[-8:], v[-8:] = (torch.randn(8, page_size, 4, 128, device="cuda").bfloat16() for _ in "kv")
    step = make_step([20], [5 * page_size + 3], torch.arange(pages - 8, pages).int().view(1, 8), page_size, "cuda")
    q = torch.randn(20, 4, 128, device="cuda").bfloat16()
    impl: Any = extend(request, "cuda")
    right = reference(request, "cuda")(q, k, v, step, None)
    torch.testing.assert_close(impl(q, k, v, step, impl.plan(step)), right, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_steps() -> None:  # requirement E12, P37
    request = request_of(graph=True, dtype="bfloat16", head_dim=128)
    impl: Any = extend(request, "cuda")
    k, v = a_cache(request, 60, "cuda")
    make = held_steps("cuda")
    q = torch.randn(100, 4, 128, device="cuda").bfloat16()
    step = make(*STEPS[0])
    payload = impl.plan(step)
    impl(q, k, v, step, payload)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = impl(q, k, v, step, payload)
    for q_lens, kv_lens in STEPS * 2:
        step = make(q_lens, kv_lens)
        impl.update(step, payload)
        q.normal_()
        out.fill_(torch.nan)
        graph.replay()
        tokens = sum(q_lens)
        right = reference(request, "cuda")(q[:tokens], k, v, step, None)
        torch.testing.assert_close(out[:tokens], right, atol=2e-2, rtol=2e-2)
        assert int(out[tokens:].ne(0).sum()) == 0
