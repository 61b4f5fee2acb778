"""aiter's unified attention: bound against the kept signatures, and by value against its habits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import emulated.aiter_triton
import emulated.library
import emulated.signatures
import pytest
import torch
from emulated.amd import KERNELS, built, check_corners, device_of, values
from emulated.replay import empty_steps, replays, smaller_steps

import hal
from hal.testing import check
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_rocm import aiter_triton_kernels

ARCHS = aiter_triton_kernels.KERNELS[0].platforms["rocm"].only
NEEDS = next(n.versions for n in aiter_triton_kernels.KERNELS[0].needs if n.library == "amd-aiter")
VERSIONS = [v for v in emulated.signatures.versions("amd-aiter") if hal.Version.parse(v).satisfies(NEEDS)]
FLAVOURS = {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn", "gfx1201": "float8_e4m3fn"}
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 128, "kv_layout": "NHD"}


@contextlib.contextmanager
def aiter_triton(arch: str = "gfx942", version: str = "") -> Iterator[emulated.library.Installed]:
    version = version or VERSIONS[-1]
    fp8 = getattr(torch, FLAVOURS[arch]) if arch in FLAVOURS else None
    found = emulated.aiter_triton.emulations(version, fp8)
    with emulated.library.installed("amd-aiter", version, found, adapters=["hal_rocm._aiter_triton"]) as library:
        yield library


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize("phase", ["extend", "decode"])
@pytest.mark.parametrize("arch", ARCHS)
def test_corners_by_value(phase: str, arch: str) -> None:
    # requirement A5, B5, C7, D1, D4, D8, D14, D15, E8, P22, P23, P24, P30
    with aiter_triton(arch):
        check_corners(f"aiter_triton.{phase}", arch, 12 if arch == "gfx942" else 3)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_calls_bind_in_every_supported_version(phase: str, version: str) -> None:
    # requirement A4, B13, P39
    fields = {"window": 9, "softcap": 5.0, "sinks": True, "kv_dtype": "float8_e4m3fnuz"}
    for wanted in (request(**fields), request(alibi=True, graph=True, max_q_len=2)):
        case = make_case(wanted, phase, lengths=((2, 130), (2, 9)) if wanted.max_q_len == 2 else ((1, 130), (1, 9)))
        with aiter_triton(version=version) as library:
            values(case, built(f"aiter_triton.{phase}", wanted), 0.1)
        assert library.called("unified_attention")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e4m3fnuz"])
def test_caches_are_in_the_flavour_of_the_arch(arch: str, kv_dtype: str) -> None:
    # requirement D8, P29, P31
    wanted = request(kv_dtype=kv_dtype)
    reasons = KERNELS["aiter_triton.decode"].check(wanted, device_of(arch))
    own = FLAVOURS.get(arch)
    assert [r.code for r in reasons] == ([] if kv_dtype == own else ["dtype"])
    if kv_dtype != own:
        allowed = " or ".join(filter(None, ("bfloat16", own)))
        assert reasons[0].text == f"kv_dtype {kv_dtype}; on {arch} it needs {allowed}"


def test_the_other_flavour_reads_as_other_numbers() -> None:
    # requirement P29, P30
    wanted = request(kv_dtype="float8_e4m3fn")
    case = make_case(wanted, "decode", lengths=((1, 130),))
    with aiter_triton("gfx942"), pytest.raises(AssertionError, match="not close"):
        values(case, built("aiter_triton.decode", wanted), 0.1)
    with aiter_triton("gfx950"):
        values(case, built("aiter_triton.decode", wanted, "gfx950"), 0.1)


@pytest.mark.parametrize(("version", "page_size", "leaks"), [("", 16, True), ("", 64, True), ("", 128, False)])
def test_small_pages_let_nan_through(version: str, page_size: int, leaks: bool) -> None:
    # requirement D15
    wanted = request(page_size=page_size)
    assert leaks == bool(refusal("aiter_triton.decode", wanted))
    case = make_case(wanted, "decode", lengths=((1, page_size + 3), (1, 5)))
    with aiter_triton(version=version):
        assert case.call(built("aiter_triton.decode", wanted))["out"].isnan().any() == leaks


def test_pages_were_tiles_before() -> None:
    # requirement D15
    case = make_case(request(), "decode", lengths=((1, 130),))
    old = "0.1.10"
    assert not hal.Version.parse(old).satisfies(NEEDS)
    with aiter_triton(version=old):
        assert case.call(built("aiter_triton.decode", request()))["out"].isnan().any()


def refusal(name: str, wanted: AttentionRequest, arch: str = "gfx942") -> str:
    try:
        check(KERNELS[name], wanted, device=device_of(arch))
    except hal.errors.InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"causal": False}, "causal"),
        ({"return_lse": True}, "return_lse"),
        ({"head_dim": 192}, "head_dim"),
        ({"page_size": 48}, "page_size"),
        ({"kv_scale": "head", "kv_dtype": "float8_e4m3fnuz"}, "kv_scale"),
        ({"v_head_dim": 128}, "v_head_dim"),
    ],
)
def test_what_it_lacks_is_refused(fields: dict[str, Any], field: str) -> None:
    # requirement B5, C7, D8
    for phase in ("extend", "decode"):
        with aiter_triton():
            assert field in refusal(f"aiter_triton.{phase}", request(**fields))


def test_single_queries_are_told_only_where_row_and_token_are_one() -> None:
    # requirement A6, D1
    wanted = request()
    ragged = make_case(wanted, "extend", lengths=((0, 5), (1, 9), (1, 130)))
    with aiter_triton() as library:
        values(ragged, built("aiter_triton.extend", wanted))
        (call,) = library.calls
        assert call.arguments["max_seqlen_q"] == 2
        out = torch.zeros_like(call.arguments["q"])
        told = {**call.passed, "max_seqlen_q": 1, "out": out}
        emulated.aiter_triton.emulations(VERSIONS[-1])["unified_attention"](**told)
        assert not torch.allclose(out.double(), ragged.expected()["out"], atol=2e-2)
    decode = make_case(wanted, "decode", lengths=((1, 9), (1, 130)))
    with aiter_triton() as library:
        values(decode, built("aiter_triton.decode", wanted))
    assert library.calls[-1].arguments["max_seqlen_q"] == 1


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_either_layout_is_a_view(layout: str) -> None:
    # requirement C7, D8, P32
    wanted = request(kv_layout=layout)
    case = make_case(wanted, "decode", lengths=((1, 9), (1, 130)))
    with aiter_triton() as library:
        values(case, built("aiter_triton.decode", wanted))
    (call,) = library.calls
    for name, cache in (("k", case.args[1]), ("v", case.args[2])):
        assert call.arguments[name].data_ptr() == cache.data_ptr()
        assert call.arguments[name].shape[1:] == (128, 2, 64)


def test_scales_are_always_tensors() -> None:
    # requirement C7, P30
    wanted = request(kv_dtype="float8_e4m3fnuz")
    case = make_case(wanted, "decode", lengths=((1, 9),))
    assert {"k_scale", "v_scale"} <= set(case.kwargs)
    with aiter_triton() as library:
        implementation = built("aiter_triton.decode", wanted)
        payload = implementation.plan(case.args[3])
        implementation(*case.args, payload)
        implementation(*case.args, payload, **case.kwargs)
    bare, scaled = (c.arguments for c in library.calls)
    assert bare["k_descale"].tolist() == bare["v_descale"].tolist() == [1.0]
    assert scaled["k_descale"] is case.kwargs["k_scale"]
    assert scaled["v_descale"] is case.kwargs["v_scale"]


def test_no_rows() -> None:
    case = make_case(request(), "extend", lengths=((0, 5), (0, 3)))
    with aiter_triton() as library:
        out = case.call(built("aiter_triton.extend", request()))["out"]
    assert out.shape == (0, 4, 64)
    assert not library.calls


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_a_graph_captured_with_short_rows_serves_longer_ones(phase: str) -> None:  # requirement E3, E12, P37
    longer = [([30, 1], [60, 5]), ([1, 0, 39], [3, 0, 900])] if phase == "extend" else [([4, 4], [60, 800])]
    wanted = request(phases=(phase,), max_q_len=4)
    with aiter_triton():
        found = list(replays(lambda r: built(f"aiter_triton.{phase}", r), wanted, [([2, 2], [2, 9]), *longer]))
    assert found
    for out, right in found:
        torch.testing.assert_close(out, right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_a_step_of_fewer_rows_than_its_plan_and_one_of_none(phase: str) -> None:  # requirement P37, D5
    wanted = request(phases=(phase,), max_q_len=3)
    with aiter_triton():
        for found, right in smaller_steps(lambda r: built(f"aiter_triton.{phase}", r), wanted):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
        paged, cache = built(f"aiter_triton.{phase}", wanted), torch.zeros(2, 128, 2, 64, dtype=torch.bfloat16)
        for step, tokens in empty_steps(128):
            q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
            assert paged(q, cache, cache, step, paged.plan(step)).shape == (tokens, 4, 64)
