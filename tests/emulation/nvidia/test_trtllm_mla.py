"""trtllm-gen's decode over latents: bound against the kept signatures, and by value against its habits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flashinfer, hardware, library, signatures
from emulated.library import Installed

import hal
from hal import testing
from hal_nvidia import trtllm_mla_kernels
from hal_nvidia._flashinfer_pool import _zeroed
from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case

(KERNEL,) = trtllm_mla_kernels.KERNELS
FUNCTION = "trtllm_batch_decode_with_kv_cache_mla"
NEEDS = next(n.versions for n in KERNEL.needs if n.library == flashinfer.LIBRARY)
VERSIONS = [v for v in signatures.versions(flashinfer.LIBRARY) if hal.Version.parse(v).satisfies(NEEDS)]
NEWEST = {"torch": "2.13.0", flashinfer.LIBRARY: VERSIONS[-1]}


@contextlib.contextmanager
def installed(arch: str = "sm_100", version: str = VERSIONS[-1]) -> Iterator[Installed]:
    functions = flashinfer.emulations(version, arch)
    with (
        hal.simulate(libraries={"torch": "2.13.0", flashinfer.LIBRARY: version}),
        library.installed(flashinfer.LIBRARY, version, functions) as held,
    ):
        yield held
    _zeroed.clear()


def request(**fields: Any) -> MlaAttentionRequest:
    return MlaAttentionRequest(**{"num_q_heads": 16, "page_size": 32, "phases": ("decode",), **fields})


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
def test_corners_by_value(arch: str) -> None:  # requirement A5, B5, B15, C7, D1, D15, E8
    with installed(arch) as held:
        given = testing.corners(KERNEL, device=hardware.device_of(arch), limit=None if arch == "sm_100" else 2)
        assert len(given) >= (7 if arch == "sm_100" else 2)
        assert [str(r) for r in (hardware.check(KERNEL, x, arch) for x in given) if not r.ok] == []
    assert {call.arguments["backend"] for call in held.called(FUNCTION)} == {"trtllm-gen"}


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_bind_in_every_supported_version(version: str) -> None:  # requirement A4, P39
    assert len(VERSIONS) > 4
    with installed(version=version) as held:
        result = hardware.check(KERNEL, request(return_lse=True, max_q_len=2, softmax_scale=0.3), "sm_100")
        assert result.ok, str(result)
    assert {call.passed["bmm1_scale"] for call in held.called(FUNCTION)} == {0.3}


@pytest.mark.parametrize(("page_size", "pages", "width"), [(32, 1, 4), (32, 5, 8), (64, 3, 4), (64, 2, 2)])
def test_a_block_table_has_a_width_that_is_taken(page_size: int, pages: int, width: int) -> None:
    case = make_case(request(page_size=page_size), "decode", lengths=[(1, 5)])
    q, cache, step = case.args
    step.block_table = step.block_table[:, :1].repeat(1, pages)
    with installed() as held:
        impl = hardware.build(KERNEL, case.request, "sm_100")
        payload = impl.plan(step)
        impl(q, cache, step, payload)
    (call,) = held.called(FUNCTION)
    assert call.arguments["block_tables"].shape == (1, width)
    assert (payload.table is step.block_table) == (width == pages)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_fp8_cache_takes_fp8_queries_where_they_are_permitted(version: str) -> None:  # requirement B6, B7
    wanted = request(kv_dtype="float8_e4m3fn", fp8_query=True, max_q_len=2, softmax_scale=0.3)
    with installed(version=version) as held:
        result = hardware.check(KERNEL, wanted, "sm_100")
        assert result.ok, str(result)
    for call in held.called(FUNCTION):
        assert call.passed["query"].dtype == call.passed["kv_cache"].dtype == torch.float8_e4m3fn
        assert call.passed["bmm1_scale"].numel() == 1
        assert call.passed["bmm2_scale"].tolist() == [0.5]


def test_what_permits_fp8_queries_changes_nothing_without_an_fp8_cache() -> None:
    with installed() as held:
        assert hardware.check(KERNEL, request(fp8_query=True), "sm_100").ok
    assert {call.passed["query"].dtype for call in held.called(FUNCTION)} == {torch.bfloat16}


def test_rows_that_there_are_not_are_left_out() -> None:  # requirement P37
    hal.reset()
    with installed() as held:
        device = hardware.device_of("sm_100")
        attn = hal.get_mla_attention(num_q_heads=16, page_size=64, device=device, kernel={"decode": "trtllm_gen"})
        cache = attn.allocate_kv_cache(4)
        cache.data.normal_()
        plan = attn.plan(q_lens=[1, 1], kv_lens=[70, 3], block_table=[[0, 1], [2, 0]], max_batch=4)
        q = torch.randn(4, 16, 576).bfloat16()
        first = attn(q, cache=cache, plan=plan)
        assert [bool(row.any()) for row in first] == [True, True, False, False]
        plan.update(q_lens=[1], kv_lens=[70], block_table=[[0, 1]])
        assert torch.equal(attn(q[:1], cache=cache, plan=plan), first[:1])
        assert [len(call.arguments["query"]) for call in held.called(FUNCTION)] == [2, 1]
    hal.reset()


def test_a_step_without_queries_does_not_reach_the_library() -> None:
    case = make_case(request(), "decode", lengths=[(1, 5)])
    q, cache, step = case.args
    step.q_lens = (0,)
    with installed() as held:
        impl = hardware.build(KERNEL, request(return_lse=True), "sm_100")
        out, lse = impl(q[:0], cache, step, impl.plan(step), return_lse=True)
        assert (out.shape, lse.shape) == ((0, 16, 512), (0, 16))
        step.q_lens = (1,)
        with pytest.raises(ValueError, match="the plan is for 1"):
            impl(q[:0], cache, step, impl.plan(step))
    assert not held.called(FUNCTION)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"page_size": 16}, "page_size"),
        ({"page_size": 128}, "page_size"),
        ({"max_q_len": 9}, "max_q_len"),
        ({"causal": False}, "causal"),
        ({"graph": True}, "graph"),
        ({"deterministic": True}, "deterministic"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim"),
        ({"qk_nope_head_dim": 192}, "qk_nope_head_dim"),
        ({"kv_dtype": "fp8"}, "kv_dtype"),
        ({"kv_dtype": "float8_e5m2", "fp8_query": True}, "kv_dtype"),
        ({"kv_dtype": "fp8", "fp8_query": True, "return_lse": True}, "return_lse"),
    ],
)
def test_what_it_does_not_do_is_refused(fields: dict[str, Any], field: str) -> None:  # requirement P22, D11
    with hal.simulate("nvidia:sm_100,cuda=13.0", libraries=NEWEST):
        candidates = hal.select(request(**fields)).choices["decode"].candidates
        reasons = next(c.reasons for c in candidates if c.kernel is KERNEL or c.kernel.name == KERNEL.name)
        assert field in {r.field for r in reasons}
        assert hal.select(request()).kernels() == {"decode": KERNEL.name}
    with hal.simulate("nvidia:sm_120,cuda=13.0", libraries=NEWEST):
        assert hal.select(request()).kernels()["decode"] != KERNEL.name


@pytest.mark.parametrize(
    ("version", "taken", "refused"),
    [("0.6.13", (1, 16, 64, 128), (6, 24, 40, 96, 256)), ("0.6.17", (1, 24, 40, 64, 128), (65, 96, 127, 256))],
)
def test_heads_that_its_tiles_do_not_fit_are_refused(
    version: str, taken: tuple[int, ...], refused: tuple[int, ...]
) -> None:  # requirement D13
    with hal.simulate("nvidia:sm_100,cuda=13.0", libraries={**NEWEST, "flashinfer-python": version}):
        for heads in (*taken, *refused):
            candidates = hal.select(request(num_q_heads=heads)).choices["decode"].candidates
            reasons = next(c.reasons for c in candidates if c.kernel.name == KERNEL.name)
            assert [r.field for r in reasons] == ["num_q_heads"] * (heads in refused), heads
