"""aiter's MLA decode: bound against the kept signatures, and by value against its habits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulated.signatures
import pytest
import torch
from emulated.aiter_mla import installed
from emulated.amd import KERNELS, built, check_corners, device_of

import hal
from hal.testing import check
from hal_ops.attention.paged_inputs import make_step
from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case

NAME = "aiter.mla_decode"
OVER_FP8 = "aiter.mla_fp8_decode"
FLAVOUR = {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}
VERSIONS = [
    *(("amd-aiter-wheel", v) for v in emulated.signatures.versions("amd-aiter-wheel")),
    *(("amd-aiter", v) for v in emulated.signatures.versions("amd-aiter")),
]
AITER = {"torch": "2.9.1", "triton": "3.4.0", "amd-aiter": "0.1.20.post1"}


@pytest.fixture(autouse=True)
def quantizes_without_triton() -> Iterator[None]:
    with hal.override(op_fp8_quantize="torch"):  # Triton's cannot run here
        yield


def request(**fields: Any) -> MlaAttentionRequest:
    return MlaAttentionRequest(**{"num_q_heads": 16, "page_size": 16, "phases": ("decode",), **fields})


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_corners_by_value(arch: str) -> None:
    # requirement A5, B5, B15, C7, D1, D15, E8
    with installed() as library:
        results = check_corners(NAME, arch, None if arch == "gfx942" else 3)
    assert len(results) >= (6 if arch == "gfx942" else 3)
    assert library.called("mla_decode_fwd")


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_bind_in_every_supported_version(version: tuple[str, str]) -> None:  # requirement A4, P39
    with installed(version[1], version[0]) as library:
        result = check(KERNELS[NAME], request(softmax_scale=0.3), device=device_of())
        assert result.ok, result
    assert {call.passed["sm_scale"] for call in library.called("mla_decode_fwd")} == {0.3}


@pytest.mark.parametrize("arch", FLAVOUR)
def test_an_fp8_cache_takes_queries_of_its_format_and_a_scale_of_each(arch: str) -> None:  # requirement B6, B7
    with installed() as library:
        results = check_corners(OVER_FP8, arch, 4)
        assert len(results) == 4
    for call in library.called("mla_decode_fwd"):
        assert call.passed["q"].dtype == call.passed["kv_buffer"].dtype == getattr(torch, FLAVOUR[arch])
        assert call.passed["kv_scale"].tolist() == [0.5]
        assert call.passed["num_kv_splits"] == 1


@pytest.mark.parametrize("version", [v for name, v in VERSIONS if hal.Version.parse(v).satisfies(">=0.1.12")])
def test_calls_over_fp8_bind_in_every_supported_version(version: str) -> None:  # requirement A4, P39
    with installed(version):
        wanted = request(kv_dtype="float8_e4m3fnuz", fp8_query=True, num_q_heads=128)
        result = check(KERNELS[OVER_FP8], wanted, device=device_of())
        assert result.ok, result


def test_over_fp8_rows_without_keys_are_cleared_and_what_no_row_has_is_not_looked_at() -> None:  # requirement B15
    wanted = request(kv_dtype="float8_e4m3fnuz", fp8_query=True)
    cache = torch.randn(2, 16, 576).to(torch.float8_e4m3fnuz)
    q = torch.randn(4, 16, 576).bfloat16()
    q[2:] = torch.nan
    for kv_lens, seen in (([3, 0], [True, False]), ([0, 0], [False, False])):
        step = make_step([1, 1], kv_lens, torch.tensor([[1], [7]]), 16)
        with installed() as library:
            impl = built(OVER_FP8, wanted)
            out = impl(q, cache, step, impl.plan(step))
        assert [bool(row.any()) for row in out] == [*seen, False, False]
        assert out.isfinite().all()
        assert len(library.calls) == any(kv_lens)


@pytest.mark.parametrize(
    ("change", "version", "field"),
    [
        ({"fp8_query": False}, "0.1.20.post1", "fp8_query"),
        ({"kv_dtype": "float8_e4m3fn"}, "0.1.20.post1", "kv_dtype"),
        ({}, "0.1.10", "library"),
        ({"num_q_heads": 32}, "0.1.20.post1", "num_q_heads"),
    ],
)
def test_over_fp8_what_it_does_not_do_is_refused(change: dict[str, Any], version: str, field: str) -> None:
    wanted = request(**{"kv_dtype": "fp8", "fp8_query": True, **change})
    with hal.simulate("rocm:gfx942,hip=6.4", libraries={**AITER, "amd-aiter": version}):
        candidates = hal.select(wanted).choices["decode"].candidates
        reasons = next(c.reasons for c in candidates if c.kernel.name == OVER_FP8)
        assert [r.field for r in reasons] == [field]
    with hal.simulate("rocm:gfx942,hip=6.4", libraries=AITER):
        assert hal.select(request(kv_dtype="fp8", fp8_query=True)).kernels() == {"decode": OVER_FP8}


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_any_page_size_is_served_without_a_copy(page_size: int) -> None:  # requirement D15
    case = make_case(request(page_size=page_size), "decode", lengths=((1, 17), (1, 33), (1, 1)))
    cache = case.args[1]
    with installed() as library:
        assert all(c.ok for c in case.check(built(NAME, case.request)))
    seen = library.calls[0].arguments["kv_buffer"]
    assert seen.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    assert (seen.shape[0], seen.shape[1:]) == (cache.shape[0] * page_size, (1, 1, 576))


def test_layers_that_share_a_tensor_are_served_without_a_copy() -> None:
    case = make_case(request(), "decode", lengths=((1, 17), (1, 40)))
    q, cache, step = case.args
    layers = torch.stack([torch.full_like(cache, torch.nan), cache], 1)
    with installed():
        impl = built(NAME, case.request)
        assert torch.equal(impl(q, layers[:, 1], step, impl.plan(step)), impl(q, cache, step, impl.plan(step)))


def test_rows_without_keys_are_cleared_and_tokens_of_no_row_too() -> None:  # requirement B15
    wanted = request()
    step = make_step([1, 1, 1], [3, 0, 5], torch.tensor([[1], [7], [0]]), 16)
    cache, q = torch.randn(2, 16, 576).bfloat16(), torch.randn(5, 16, 576).bfloat16()
    with installed() as library:
        impl = built(NAME, wanted)
        out = impl(q, cache, step, impl.plan(step))
    assert len(library.calls[0].arguments["q"]) == 3
    assert out.isfinite().all()
    assert [bool(row.any()) for row in out] == [True, False, True, False, False]


def test_a_plan_with_room_for_more_rows_hands_over_those_that_there_are() -> None:  # requirement P37
    with hal.simulate(libraries=AITER), installed() as library:
        attn = hal.get_mla_attention(num_q_heads=16, page_size=16, device=device_of(), kernel={"decode": "aiter"})
        cache = attn.allocate_kv_cache(4)
        cache.data.normal_()
        plan = attn.plan(q_lens=[1, 1], kv_lens=[20, 3], block_table=[[0, 1], [2, 0]], max_batch=4)
        q = torch.randn(2, 16, 576).bfloat16()
        first = attn(q, cache=cache, plan=plan)
        plan.update(q_lens=[1], kv_lens=[20], block_table=[[0, 1]])
        assert torch.equal(attn(q[:1], cache=cache, plan=plan), first[:1])
    assert [len(call.arguments["qo_indptr"]) for call in library.called("mla_decode_fwd")] == [3, 2]


def test_queries_that_are_views_are_copied_as_declared() -> None:  # requirement C7
    assert "q, where" in KERNELS[NAME].copies
    case = make_case(request(), "decode", lengths=((1, 20), (1, 30)))
    q, cache, step = case.args
    with installed():
        impl = built(NAME, case.request)
        wide = torch.cat([q, q], 1)[:, :16]
        assert torch.equal(impl(wide, cache, step, impl.plan(step)), impl(q, cache, step, impl.plan(step)))


def test_a_cache_beyond_its_reach_is_an_error() -> None:
    wanted = request()
    step = make_step([1], [1], torch.tensor([[0]]), 16)
    with installed():
        impl = built(NAME, wanted)
        pages = torch.empty(116600, 16, 576, dtype=torch.bfloat16, device="meta")
        with pytest.raises(ValueError, match="above 2 GiB"):
            impl(torch.zeros(1, 16, 576).bfloat16(), pages, step, impl.plan(step))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"num_q_heads": 32}, "num_q_heads"),
        ({"dtype": "float16"}, "dtype"),
        ({"max_q_len": 2}, "max_q_len"),
        ({"return_lse": True}, "return_lse"),
        ({"graph": True}, "graph"),
        ({"kv_lora_rank": 256}, "kv_lora_rank"),
    ],
)
def test_what_it_does_not_do_is_refused(fields: dict[str, Any], code: str) -> None:  # requirement P22, D11
    with hal.simulate("rocm:gfx942,hip=6.4", libraries=AITER):
        candidates = hal.select(request(**fields)).choices["decode"].candidates
        reasons = next(c.reasons for c in candidates if c.kernel.name == NAME)
        assert code in {r.field for r in reasons}
        assert hal.select(request()).kernels() == {"decode": NAME}


def test_planning_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement P38
    case = make_case(request(), "decode", lengths=((1, 20), (1, 30)))

    def waits(self: Any, *_: Any) -> Any:
        raise AssertionError("it waits for the device")

    with installed():
        impl = built(NAME, case.request)
        for method in ("item", "tolist", "cpu", "__bool__"):
            monkeypatch.setattr(torch.Tensor, method, waits)
        impl.plan(case.args[2])
        monkeypatch.undo()
