"""MATE's adapters: bound against the kept signatures, and by value against MATE's habits."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import emulated.library
import emulated.mate
import emulated.signatures
import pytest
import torch
from emulated.replay import empty_steps, replays, smaller_steps

import hal
from hal import _bind
from hal.testing import check, corners
from hal_musa import mate_kernels
from hal_ops.attention import ATTENTION, AttentionRequest
from hal_ops.attention.cases import make_case

KERNELS = {k.name: k for k in mate_kernels.KERNELS}
PAGED = ("mate.extend", "mate.decode")
SUPPORTED = [v for v in emulated.signatures.versions("mate") if hal.Version.parse(v).satisfies(">=0.2.1")]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}

Device = Callable[..., hal.Device]


@contextlib.contextmanager
def mate(version: str = SUPPORTED[-1]) -> Iterator[emulated.library.Installed]:
    with emulated.library.installed("mate", version, emulated.mate.FUNCTIONS, adapters=["hal_musa._mate"]) as library:
        yield library


def built(name: str, request: AttentionRequest, place: Any) -> Any:
    return _bind.build(KERNELS[name], ATTENTION, request, place)


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize("name", KERNELS)
def test_corners_by_value(name: str, device: Device) -> None:
    # requirement A5, A6, B5, B13, B15, B16, C7, C11, D1, D4, D8, D15, E8, P22, P23, P24
    kernel, place = KERNELS[name], device()
    with mate():
        results = [check(kernel, r, device=place) for r in corners(kernel, op=ATTENTION, device=place)]
    assert len(results) > 20
    assert not [r for r in results if not r.ok], "\n".join(str(r) for r in results if not r.ok)


@pytest.mark.parametrize(("name", "version"), list(itertools.product(KERNELS, SUPPORTED)))
def test_calls_bind_in_every_supported_version(name: str, version: str, device: Device) -> None:
    # requirement A4, P39
    wanted = request(window=9, softcap=5.0, return_lse=True)
    with mate(version) as library:
        assert check(KERNELS[name], wanted, device=device()).ok
    function = "flash_attn_varlen_func" if name == "mate.prefill" else "flash_attn_with_kvcache"
    assert library.called(function)
    assert bool(library.called("get_scheduler_metadata")) == (name in PAGED)


def test_functions_that_are_emulated_have_the_kept_parameters() -> None:
    kept = emulated.signatures.functions("mate", "0.2.2")
    for name, function in emulated.mate.FUNCTIONS.items():
        (signature,) = [s for full, s in kept.items() if full.endswith(f":{name}")]
        code = function.__code__
        assert code.co_varnames[: code.co_argcount] == tuple(signature.parameters)


def test_the_planners_differ_in_their_seventh_parameter() -> None:
    # requirement A1, A4
    def seventh(library: str) -> str:
        planner = emulated.signatures.signature(
            library, emulated.signatures.versions(library)[-1], "get_scheduler_metadata"
        )
        return list(planner.parameters)[6]

    assert (seventh("mate"), seventh("flash-attn-3")) == ("seqused_q", "cache_seqlens")
    assert seventh("mate-flash-attn-3") == "cache_seqlens"


@pytest.mark.parametrize("name", PAGED)
def test_the_planner_is_called_by_keywords_alone_and_once_a_step(name: str, device: Device) -> None:
    # requirement A1, A3, B10, E3
    wanted = request(max_q_len=3, window=40)
    case = make_case(wanted, KERNELS[name].phase)
    step = case.args[3]
    with mate() as library:
        implementation = built(name, wanted, device())
        payload = implementation.plan(step)
        for _ in range(3):
            implementation(*case.args, payload, **case.kwargs)
    (planned,) = library.called("get_scheduler_metadata")
    assert planned.arguments["seqused_q"] is None
    assert planned.passed["seqused_k"] is step.kv_lens
    calls = library.called("flash_attn_with_kvcache")
    assert len(calls) == 3
    for call in calls:
        assert call.arguments["scheduler_metadata"] is payload.metadata
        width = call.arguments["page_table"].shape[1] * call.arguments["k_cache"].shape[1]
        assert planned.arguments["max_seqlen_k"] == width
        for shared in ("max_seqlen_q", "causal", "window_size"):
            assert call.arguments[shared] == planned.arguments[shared]


def test_metadata_is_planned_on_the_handles_own_device(device: Device, current_device: Callable[[], object]) -> None:
    # requirement C3, X7
    seen = []

    def planner(*args: Any) -> Any:
        seen.append(current_device())
        return emulated.mate.get_scheduler_metadata(*args)

    functions = {**emulated.mate.FUNCTIONS, "get_scheduler_metadata": planner}
    wanted, before = request(), current_device()
    case = make_case(wanted, "decode")
    with emulated.library.installed("mate", "0.2.2", functions, adapters=["hal_musa._mate"]):
        for index in (1, 0):
            place: Any = SimpleNamespace(torch_device=lambda i=index: torch.device("cpu", i))
            built("mate.decode", wanted, place).plan(case.args[3])
    assert seen == [torch.device("cpu", 1), torch.device("cpu", 0)]
    assert current_device() == before


SHAPING: dict[str, Any] = {
    "num_q_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 128,
    "dtype": "float16",
    "page_size": 32,
    "causal": False,
    "window": 7,
    "softcap": 3.0,
    "max_q_len": 2,
}


@pytest.mark.parametrize("field", SHAPING)
def test_every_input_that_shapes_the_metadata_reaches_the_planner(field: str, device: Device) -> None:
    # requirement C4, C5, P36
    def told(wanted: AttentionRequest) -> dict[str, Any]:
        with mate() as library:
            case = make_case(wanted, "decode", lengths=((wanted.max_q_len, 9), (wanted.max_q_len, 70)))
            built("mate.decode", wanted, device()).plan(case.args[3])
        (call,) = library.called("get_scheduler_metadata")
        return {n: v for n, v in call.arguments.items() if not isinstance(v, torch.Tensor)}

    plain, changed = told(request()), told(request(**{field: SHAPING[field]}))
    if field == "page_size":
        assert plain == changed, "a cache is planned as pages of one token, whatever its page size"
    else:
        assert plain != changed


def test_lengths_that_change_in_place_are_seen(device: Device) -> None:
    # requirement C6
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 20), (1, 30)))
    step = case.args[3]
    with mate():
        implementation = built("mate.decode", wanted, device())
        first = implementation.plan(step)
        kept = first.table.clone(), first.metadata.clone()
        step.kv_lens.copy_(torch.tensor([31, 5]))
        second = implementation.plan(step)
    assert not torch.equal(second.table, kept[0])
    assert not torch.equal(second.metadata, kept[1])
    assert torch.equal(first.table, kept[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_updated_plan_keeps_its_addresses_and_is_right(interleaved: bool, device: Device) -> None:
    # requirement E12, P37, C6
    wanted = request(graph=True)
    with mate():
        implementation = built("mate.decode", wanted, device())
        case = make_case(wanted, "decode", lengths=((1, 40), (1, 9)), interleaved=interleaved)
        payload = implementation.plan(case.args[3])
        implementation(*case.args, payload, **case.kwargs)
        held = [payload.table, payload.metadata, *payload.spread.values()]
        addresses = [x.data_ptr() for x in held]
        other = make_case(wanted, "decode", lengths=((1, 3), (1, 41)), interleaved=interleaved, seed=1)
        updated = implementation.update(other.args[3], payload)
        assert updated is payload
        assert [x.data_ptr() for x in held] == addresses
        out = implementation(*other.args, updated, **other.kwargs)
        again = implementation(*other.args, implementation.plan(other.args[3]), **other.kwargs)
    assert len(held) == 2 + interleaved
    assert torch.equal(out, again)
    torch.testing.assert_close(out.double(), other.expected()["out"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_leaving_the_metadata_out_changes_nothing(phase: str, device: Device) -> None:
    # requirement A6
    wanted = request(max_q_len=2, return_lse=True)
    case = make_case(wanted, phase)
    with mate():
        implementation = built(f"mate.{phase}", wanted, device())
        payload = implementation.plan(case.args[3])
        with_it = implementation(*case.args, payload, **case.kwargs)
        without = implementation(*case.args, dataclasses.replace(payload, metadata=None), **case.kwargs)
    for one, other in zip(with_it, without, strict=True):
        assert torch.equal(one, other)


def test_slots_past_a_length_are_never_read(device: Device) -> None:
    # requirement D15
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 17), (1, 33)))
    q, k_cache, v_cache, step = case.args
    assert v_cache.isnan().any()
    with mate():
        spoilt = emulated.mate.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=step.kv_lens, page_table=step.block_table,
            cu_seqlens_q=step.cu_seqlens_q, max_seqlen_q=1, softmax_scale=0.1, causal=True,
        )  # fmt: skip
        implementation = built("mate.decode", wanted, device())
        payload = implementation.plan(step)
        right = implementation(*case.args, payload, **case.kwargs)
    assert spoilt.isnan().any(), "the library itself would read them"
    assert right.isfinite().all()
    for row, length in enumerate(step.kv_lens_host):
        assert (payload.table[row, length:] == payload.table[row, length - 1]).all()
    assert payload.table.shape[1] % 64 == 0


@pytest.mark.parametrize(
    ("fields", "causal", "window"),
    [
        ({}, True, (-1, -1)),
        ({"window": 8}, True, (7, -1)),
        ({"causal": False}, False, (-1, -1)),
        ({"causal": False, "window": (None, 0)}, True, (-1, -1)),
        ({"causal": False, "window": (4, 0)}, True, (4, -1)),
        ({"causal": False, "window": (4, 2)}, False, (4, 2)),
    ],
)
def test_causality_is_never_a_window(
    fields: dict[str, Any], causal: bool, window: tuple[int, int], device: Device
) -> None:
    # requirement E8, C11
    wanted = request(**fields, phases=("prefill",))
    with mate() as library:
        assert check(KERNELS["mate.prefill"], wanted, device=device()).ok
    assert {(c.arguments["causal"], c.arguments["window_size"]) for c in library.calls} == {(causal, window)}


def test_mubin_kernels_get_only_calls_whose_rows_all_see_a_key(device: Device) -> None:
    wanted = request(phases=("prefill",))
    x = torch.randn(6, 4, 64, dtype=torch.bfloat16)
    kv = torch.randn(6, 2, 64, dtype=torch.bfloat16)
    cu, other = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 6, 6], dtype=torch.int32)
    with mate() as library:
        attend = built("mate.prefill", wanted, device())
        lengths = {"max_seqlen_q": 6, "max_seqlen_k": 6}
        for q_lengths, k_lengths in ((cu, cu), (cu, other)):
            attend(x, kv, kv, cu_seqlens_q=q_lengths, cu_seqlens_k=k_lengths, **lengths)
        attend(x[None], kv[None], kv[None])
        attend(x[None], kv[None, :3], kv[None, :3])
    assert [c.arguments["backend"] for c in library.calls] == ["auto", "mutlass", "auto", "mutlass"]


def test_sinks_need_no_window_and_keep_their_precision(device: Device) -> None:
    # requirement B13, D11, C7
    for fields in ({}, {"window": 128}, {"window": 4}):
        for phase in ("prefill", "extend", "decode"):
            wanted = request(**fields, sinks=True, return_lse=True, dtype="float16", kv_dtype="float16")
            with mate() as library:
                assert check(KERNELS[f"mate.{phase}"], wanted, device=device()).ok
            assert all(c.arguments.get("learnable_sink") is None for c in library.calls)


def test_nothing_is_appended_and_nothing_is_dropped(device: Device) -> None:
    # requirement C7
    wanted = request()
    case = make_case(wanted, "extend")
    with mate() as library:
        implementation = built("mate.extend", wanted, device())
        payload = implementation.plan(case.args[3])
        implementation(*case.args, payload)
        one = torch.ones(1)
        for name in ("k_scale", "v_scale", "alibi_slopes", "sinks"):
            with pytest.raises(ValueError, match=r"scales|alibi|sinks"):
                implementation(*case.args, payload, **{name: one})
    for call in library.calls:
        assert call.arguments.get("cu_seqlens_k_new") is None
        assert call.arguments.get("k") is None


def test_a_cache_whose_pages_lie_oddly_is_refused(device: Device) -> None:
    # requirement P32, D8
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 40),))
    q, step = case.args[0], case.args[3]
    odd = torch.empty(8 * 16 * 128 + 512, dtype=q.dtype).as_strided((8, 16, 2, 64), (16 * 128 + 8, 128, 64, 1))
    with mate():
        implementation = built("mate.decode", wanted, device())
        with pytest.raises(ValueError, match="allocate_kv_cache"):
            implementation(q, odd, odd, step, implementation.plan(step))


def test_no_rows_and_no_tokens(device: Device) -> None:
    wanted = request(return_lse=True, sinks=True)
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with mate() as library:
        prefill = built("mate.prefill", wanted, device())
        q, kv = torch.zeros(1, 3, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 0, 2, 64, dtype=torch.bfloat16)
        out, lse = prefill(q, kv, kv, sinks=sinks, return_lse=True)
    assert not library.calls
    assert (out == 0).all()
    assert torch.equal(lse, sinks.expand(1, 3, 4))


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_a_graph_captured_with_short_rows_serves_longer_ones(phase: str, device: Device) -> None:
    # requirement E3, E12, P37
    longer = [([30, 1], [60, 5]), ([1, 0, 39], [3, 0, 100])] if phase == "extend" else [([4, 4], [60, 100])]
    wanted = request(phases=(phase,), max_q_len=4)
    with mate():
        steps = [([2, 2], [2, 9]), *longer]
        for out, right in replays(lambda r: built(f"mate.{phase}", r, device()), wanted, steps):
            torch.testing.assert_close(out, right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_a_step_of_fewer_rows_than_its_plan_and_one_of_none(phase: str, device: Device) -> None:
    # requirement P37, D5
    wanted = request(phases=(phase,), max_q_len=3)
    with mate():
        for found, right in smaller_steps(lambda r: built(f"mate.{phase}", r, device()), wanted):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
        paged, cache = built(f"mate.{phase}", wanted, device()), torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
        for step, tokens in empty_steps(16):
            q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
            assert paged(q, cache, cache, step, paged.plan(step)).shape == (tokens, 4, 64)
