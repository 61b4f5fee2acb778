"""aiter's HIP decode over keys in vectors: bound against the kept signatures, and by value against its habits."""

from __future__ import annotations

import dataclasses
from typing import Any

import emulated.aiter
import emulated.aiter_ops
import emulated.aiter_pa
import emulated.library
import emulated.signatures
import pytest
import torch
from emulated.aiter_pa import installed
from emulated.amd import KERNELS, built, check_corners, device_of, values
from emulated.replay import empty_steps, replays, smaller_steps
from torch import Tensor

import hal
from hal._eligibility import _fields
from hal.testing import check
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import AttentionCase, make_case
from hal_ops.attention.paged_inputs import make_step

NAME = "aiter_pa.decode"
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "HDN"}
VERSIONS = [
    *(("amd-aiter-wheel", v) for v in emulated.signatures.versions("amd-aiter-wheel")),
    *(("amd-aiter", v) for v in emulated.signatures.versions("amd-aiter")),
]
AITER = {"torch": "2.9.1", "triton": "3.4.0", "amd-aiter": "0.1.20.post1"}


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, "phases": ("decode",), **fields})


def bits(*tensors: Tensor) -> list[Tensor]:
    return [x.view(torch.int16).clone() for x in tensors]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_corners_by_value(arch: str) -> None:
    # requirement A5, B5, B15, C7, D1, D15, E8
    with installed() as library:
        results = check_corners(NAME, arch, None if arch == "gfx942" else 4)
    assert len(results) > (12 if arch == "gfx942" else 3)
    assert library.called("paged_attention_rocm")


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_bind_in_every_supported_version(version: tuple[str, str]) -> None:
    # requirement A4, P39
    with installed(version[1], version[0]) as library:
        result = check(KERNELS[NAME], request(softmax_scale=0.3, alibi=True), device=device_of())
        assert result.ok, result
    assert {call.passed["scale"] for call in library.calls} == {0.3}


@pytest.mark.parametrize("q_len", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_several_queries_a_row(q_len: int, interleaved: bool) -> None:
    # requirement B10, D8
    wanted = request(max_q_len=q_len, head_dim=128, page_size=32)
    case = make_case(wanted, "decode", lengths=((q_len, 17), (q_len, 300), (q_len, 32)), interleaved=interleaved)
    with installed() as library:
        values(case, built(NAME, wanted))
    (call,) = library.calls
    assert (call.passed["mtp"], call.passed["max_context_len"], call.passed["block_size"]) == (q_len, 300, 32)
    assert call.passed["exp_sums"].shape == call.passed["max_logits"].shape == (3 * q_len, 4, 2)
    assert call.passed["tmp_out"].shape == (3 * q_len, 4, 2, 128)
    assert call.passed["key_cache"] is case.args[1]
    assert call.passed["value_cache"] is case.args[2]


def test_what_lies_behind_a_row_reaches_nothing_and_stays() -> None:
    # requirement D15
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 17), (1, 33), (1, 16)))
    before = bits(*case.args[1:3])
    with installed():
        values(case, built(NAME, wanted))
    assert all(torch.equal(x, y) for x, y in zip(before, bits(*case.args[1:3]), strict=True))
    assert case.args[2].isnan().any()


def test_the_librarys_own_reading_lets_nan_through() -> None:
    # requirement D15
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 17), (1, 32)))
    with installed() as library:
        values(case, built(NAME, wanted))
        (call,) = library.calls
        spoilt = emulated.aiter_pa._decode(
            **{**call.passed, "version": hal.Version.parse("0.1.20")},
        )
    assert spoilt[0].isnan().any()
    assert not spoilt[1].isnan().any()


def test_a_nan_that_a_row_holds_is_not_swept_away() -> None:
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 17), (1, 20)))
    q, k_cache, v_cache, step = case.args
    v_cache[step.block_table[0, 1], :, :, 0] = torch.nan
    with installed():
        implementation = built(NAME, wanted)
        out = implementation(q, k_cache, v_cache, step, implementation.plan(step))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_rows_that_share_a_page_that_is_not_full() -> None:
    wanted = request()
    table = torch.tensor([[1], [1]])
    step = make_step([1, 1], [5, 9], table, 16)
    k_cache = torch.randn(3, 2, 8, 16, 8).bfloat16()
    v_cache = torch.randn(3, 2, 64, 16).bfloat16()
    v_cache[..., 9:] = torch.nan
    case = AttentionCase(
        wanted, "decode", "shared", ((1, 5), (1, 9)), (torch.randn(2, 4, 64).bfloat16(), k_cache, v_cache, step), {}
    )
    with installed():
        values(case, built(NAME, wanted))


@pytest.mark.parametrize("graph", [False, True])
def test_rows_without_keys_are_cleared(graph: bool) -> None:
    # requirement B15, E12
    wanted = request(graph=graph)
    table = torch.tensor([[2**31 - 1, 0], [1, 2], [-1, 0]], dtype=torch.int32)
    k_cache, v_cache = torch.randn(3, 2, 8, 16, 8).bfloat16(), torch.randn(3, 2, 64, 16).bfloat16()
    q = torch.randn(3, 4, 64).bfloat16()
    with installed() as library:
        implementation = built(NAME, wanted)
        for lengths, any_row in (([0, 20, 0], True), ([0, 0, 0], False)):
            step = make_step([1, 1, 1], [1, 20, 1], torch.tensor([[0, 0], [1, 2], [0, 0]]), 16)
            step = dataclasses.replace(
                step,
                block_table=table,
                kv_lens=torch.tensor(lengths, dtype=torch.int32),
                kv_lens_host=tuple(lengths),
                max_kv_len=max(lengths),
            )
            out = implementation(q, k_cache, v_cache, step, implementation.plan(step))
            assert [bool(row.any()) for row in out] == [False, any_row, False]
            assert out.isfinite().all()
    assert len(library.calls) == 1 + graph


def test_an_updated_plan_keeps_its_addresses_and_is_right() -> None:
    # requirement C6, E12, P37
    wanted = request(graph=True)
    with installed():
        implementation = built(NAME, wanted)
        case = make_case(wanted, "decode", lengths=((1, 40), (1, 9)))
        payload = implementation.plan(case.args[3])
        held = [payload.tails.pages, payload.tails.behind, payload.keyless, payload.sums, payload.tops, payload.parts]
        addresses = [x.data_ptr() for x in held]
        values(case, implementation)
        other = make_case(wanted, "decode", lengths=((1, 3), (1, 41)), seed=1)
        updated = implementation.update(other.args[3], payload)
        assert updated is payload
        assert [x.data_ptr() for x in held] == addresses
        payload.table.copy_(other.args[3].block_table)  # a handle's buffers are filled before
        out = implementation(*other.args, updated, **other.kwargs)
    torch.testing.assert_close(out.double(), other.expected()["out"], atol=2e-2, rtol=2e-2)


def test_two_plans_share_nothing() -> None:
    # requirement C4, C5, P36
    wanted = request()
    step = make_case(wanted, "decode", lengths=((1, 20), (1, 30))).args[3]
    with installed():
        implementation = built(NAME, wanted)
        first, second = implementation.plan(step), implementation.plan(step)
    for name in ("sums", "tops", "parts"):
        assert getattr(first, name).data_ptr() != getattr(second, name).data_ptr()


def test_planning_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P38
    step = make_case(request(), "decode", lengths=((1, 20), (1, 30))).args[3]

    def waits(self: Any, *_: Any) -> Any:
        raise AssertionError("it waits for the device")

    with installed():
        made = [built(NAME, request(graph=graph)) for graph in (False, True)]
        for method in ("item", "tolist", "cpu", "__bool__"):
            monkeypatch.setattr(torch.Tensor, method, waits)
        for implementation in made:
            implementation.plan(step)
        monkeypatch.undo()


def test_caches_that_it_would_misread_are_refused() -> None:
    # requirement D8, P32
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 40),))
    q, k_cache, v_cache, step = case.args
    apart = torch.stack([v_cache, v_cache], 1)[:, 0]
    with installed() as library:
        implementation = built(NAME, wanted)
        with pytest.raises(ValueError, match="the pages of K are 2048 elements apart, those of V 4096"):
            implementation(q, k_cache, apart, step, implementation.plan(step))
    assert not library.calls


def test_queries_whose_heads_lie_apart_are_copied_as_declared() -> None:
    # requirement C7
    assert "q, where" in KERNELS[NAME].copies
    wanted = request()
    q, *rest = make_case(wanted, "decode", lengths=((1, 20), (1, 30))).args
    wide = torch.cat([q, q], -1)[..., :64]
    with installed() as library:
        implementation = built(NAME, wanted)
        payload = implementation.plan(rest[2])
        assert torch.equal(implementation(wide, *rest, payload), implementation(q, *rest, payload))
    first, second = library.calls
    assert first.arguments["query"].stride(1) == second.arguments["query"].stride(1) == 64
    assert second.arguments["query"].data_ptr() == q.data_ptr()


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"kv_layout": "NHD"}, "kv_layout"),
        ({"page_size": 8}, "page_size"),
        ({"page_size": 48}, "page_size"),
        ({"head_dim": 80}, "head_dim"),
        ({"num_q_heads": 34}, "group_size"),
        ({"kv_dtype": "float8_e4m3fnuz"}, "kv_dtype"),
        ({"window": 8}, "window"),
        ({"softcap": 30.0}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"return_lse": True}, "return_lse"),
        ({"max_q_len": 5}, "max_q_len"),
    ],
)
def test_what_it_cannot_do_is_refused(fields: dict[str, Any], refused: str) -> None:
    # requirement B1, P29
    assert refused in [r.field for r in _fields(KERNELS[NAME], request(**fields))]


def test_several_queries_need_causality_and_no_graph() -> None:
    # requirement P29
    judge = KERNELS[NAME].check
    assert judge is not None
    device = device_of()
    assert not judge(request(max_q_len=2), device)
    assert [r.field for r in judge(request(max_q_len=2, causal=False), device)] == ["causal"]
    assert [r.field for r in judge(request(max_q_len=2, graph=True), device)] == ["graph"]


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100"])
def test_it_is_chosen_where_its_layout_is_asked_for(arch: str) -> None:
    # requirement B13, X16
    wanted = AttentionRequest(num_q_heads=32, num_kv_heads=8, head_dim=128, kv_layout="HDN")
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        chosen = hal.select(wanted).kernels()
        unasked = hal.select(wanted.replace(kv_layout="auto")).kernels()
    assert (chosen["decode"] == NAME) == (arch in ("gfx942", "gfx950"))
    assert NAME not in unasked.values()


def test_a_sequence_through_every_phase_of_a_handle() -> None:
    # requirement A2, A5, B8, C1, P49
    version = "0.1.20.post1"
    emulations = (emulated.aiter.emulations, emulated.aiter_ops.emulations, emulated.aiter_pa.emulations)
    found = {name: f for make in emulations for name, f in make(version).items()}
    adapters = ("hal_rocm._aiter", "hal_rocm._aiter_ops", "hal_rocm._aiter_pa")
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "device": device_of()}
    with emulated.library.installed("amd-aiter", version, found, adapters=adapters) as library:
        with hal.simulate(libraries=AITER), hal.override(attention_extend="reference"):  # Triton's cannot run here
            attn = hal.get_attention(**sizes, kv_layout="HDN")
        assert attn.kernels()["decode"] == NAME
        assert attn.kernels()["write"] == "aiter.kv_cache_write"
        cache = attn.allocate_kv_cache(4)
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
        q, k, v = (torch.randn(23, heads, 64).bfloat16() for heads in (4, 2, 2))
        outs = []
        for a, b in ((0, 9), (9, 20), (20, 21), (21, 22), (22, 23)):
            plan = attn.plan(q_lens=[b - a], kv_lens=[b], block_table=[[3, 1]])
            outs.append(attn(q[a:b], k[a:b], v[a:b], cache=cache, plan=plan))
        with hal.simulate(libraries=AITER):
            right = hal.get_attention(**sizes, kernel="reference")(q[None], k[None], v[None])
    assert len(library.called("paged_attention_rocm")) == 3
    assert len(library.called("reshape_and_cache")) == 5
    torch.testing.assert_close(torch.cat(outs), right[0], atol=2e-2, rtol=2e-2)


def test_a_graph_captured_with_short_rows_serves_longer_ones() -> None:  # requirement E3, E12, P37
    with installed():
        steps = [([1, 1], [2, 9]), ([1, 1, 1], [100, 3, 128]), ([1], [60])]
        for out, right in replays(lambda r: built(NAME, r), request(), steps):
            torch.testing.assert_close(out, right, atol=2e-2, rtol=2e-2)


def test_a_step_of_fewer_rows_than_its_plan_and_one_of_none() -> None:  # requirement P37, D5
    wanted = request(max_q_len=3)
    with installed():
        for found, right in smaller_steps(lambda r: built(NAME, r), wanted):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
        paged = built(NAME, wanted)
        k_cache, v_cache = torch.zeros(2, 2, 8, 16, 8).bfloat16(), torch.zeros(2, 2, 64, 16).bfloat16()
        for step, tokens in empty_steps(16):
            q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
            assert paged(q, k_cache, v_cache, step, paged.plan(step)).shape == (tokens, 4, 64)
