"""Latent attention through flash-attention 3 and flashinfer: right at the corners of what is declared, and what is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flashinfer, hardware, library, nvidia, signatures
from emulated.library import Installed

import hal
from hal import testing
from hal._plan import Buffers, make_step
from hal_nvidia import flashinfer_mla_kernels
from hal_nvidia._flashinfer_pool import _idle
from hal_ops import resolve_target
from hal_ops.mla_attention import MLA_ATTENTION, PHASES, MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case

KERNEL = "flash_attn_with_kvcache"
FA3 = {"torch": "2.13.0", "flash-attn-3": "3.0.0"}


@pytest.fixture
def fa3() -> Iterator[Installed]:
    hal.reset()
    with nvidia.running("fa3", libraries=nvidia.MLA) as held:
        assert held is not None
        yield held
    hal.reset()


def request_of(**fields: Any) -> MlaAttentionRequest:
    return MlaAttentionRequest(**{"num_q_heads": 4, "page_size": 16, **fields})


@pytest.mark.parametrize("phase", PHASES)
def test_a_kernel_is_right_at_the_corners_of_its_declaration(phase: str, fa3: Installed) -> None:
    kernel = hardware.kernel_named(f"fa3.mla_{phase}")
    given = testing.corners(kernel, device=hardware.device_of("sm_90"))
    assert len(given) > 10
    wrong = [str(r) for r in (hardware.check(kernel, request) for request in given) if not r.ok]
    assert wrong == []
    assert fa3.called(KERNEL)


@pytest.mark.parametrize("version", signatures.versions("flash-attn-3"))
def test_calls_bind_to_the_signatures_of_every_version(version: str) -> None:
    with nvidia.running("fa3", "flash-attn-3", version, libraries=nvidia.MLA):
        for phase in PHASES:
            result = hardware.check(f"fa3.mla_{phase}", request_of(return_lse=True, max_q_len=2))
            assert result.ok, str(result)


def test_the_latent_is_the_value_and_part_of_the_key(fa3: Installed) -> None:
    result = hardware.check("fa3.mla_decode", request_of(num_q_heads=128, softmax_scale=0.3))
    assert result.ok, str(result)
    call = fa3.called(KERNEL)[0].arguments
    assert call["q"].shape[1:] == (128, 64)
    assert call["qv"].shape[1:] == (128, 512)
    assert (call["k_cache"].shape[2:], call["v_cache"].shape[2:]) == ((1, 64), (1, 512))
    assert call["k_cache"].data_ptr() == call["v_cache"].data_ptr() + 2 * 512, "views of one cache"
    assert call["softmax_scale"] == 0.3


@pytest.mark.parametrize(("phase", "most"), [("decode", 3), ("extend", 9)])
def test_a_graph_is_launched_for_the_longest_queries(phase: str, most: int, fa3: Installed) -> None:
    # requirement E3, E12, P37
    """Of every step that its plan may be filled with: a replay is the first call made again."""
    from hal_nvidia import _flash_attn_3_mla

    request = request_of(graph=True, max_q_len=3)
    made = getattr(_flash_attn_3_mla, phase)(request, hardware.device_of("sm_90"))
    assert made.plan(make_case(request, phase, lengths=[(0, 5)]).args[2]) == 0
    right: Any = resolve_target(MLA_ATTENTION.reference[phase])(request.replace(graph=False), torch.device("cpu"))
    buffers, table = Buffers(3, 9, 2, torch.device("cpu"), most), torch.randperm(6).int().view(3, 2)
    size, q = int(request.page_size), torch.zeros(9, 4, 576, dtype=getattr(torch, request.dtype))
    cache = torch.randn(6, size, 576).to(q.dtype)
    held: tuple[Any, ...] = ()
    for q_lens, kv_lens in (([], []), ([3, 3], [5, 2 * size]), ([1], [7]), ([most], [most])):
        step = make_step(q_lens, kv_lens, table[: len(q_lens)], size, torch.device("cpu"))
        fixed, count = buffers.fill(step), sum(q_lens)
        held = held or (fixed, made.plan(fixed))
        assert held[1] == most
        found = made(q.normal_(), cache, *held)[:count]
        torch.testing.assert_close(found, right(q[:count], cache, step, None)[:count], atol=2e-2, rtol=2e-2)


def test_no_keys_and_no_queries_reach_the_library_at_all(fa3: Installed) -> None:
    from hal_nvidia import _flash_attn_3_mla

    made: Any = _flash_attn_3_mla.extend(request_of(return_lse=True), hardware.device_of("sm_90"))
    case = make_case(request_of(dtype="float16"), "extend", lengths=[(0, 5)])
    out, lse = made(*case.args, made.plan(case.args[2]), return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((0, 4, 512), (0, 4), torch.float32)
    assert not fa3.called(KERNEL)


def reasons(device: str, libraries: dict[str, str], phase: str = "decode", **fields: Any) -> list[str]:
    with hal.simulate(device, libraries=libraries):
        choice = hal.select(request_of(**fields)).choices[phase]
    candidate = next(c for c in choice.candidates if c.kernel.name == f"fa3.mla_{phase}")
    return [r.text for r in candidate.reasons]


def test_what_is_refused() -> None:
    hopper = "nvidia:sm_90,cuda=12.8"
    assert reasons(hopper, FA3) == []
    assert reasons("nvidia:sm_80,cuda=12.8", FA3) == ["needs sm_90; this is sm_80"]
    wheel = {"torch": "2.13.0", "tokenspeed-fa3": "3.0.0.post20260810"}
    text = "tokenspeed-fa3 3.0.0.post20260810 was built without unequal head dims"
    assert reasons("nvidia:sm_90,cuda=13.0", wheel) == [text]
    assert text in reasons(hopper, wheel)
    assert any("libcudart.so.13" in found for found in reasons(hopper, wheel))
    with hal.simulate(hopper, libraries={"torch": "2.13.0"}):
        (absent,) = next(
            c.reasons
            for c in hal.select(request_of()).choices["decode"].candidates
            if c.kernel.name == "fa3.mla_decode"
        )
    assert absent.code == "not_installed"
    assert "tokenspeed" not in absent.remedy, "its wheel would not do"
    text = "page_size 64; needs no multiple of 64, where NaN in unused slots changes nothing"
    assert reasons(hopper, FA3, page_size=64, num_q_heads=128) == [text]
    assert reasons(hopper, FA3, page_size=64, num_q_heads=64) == []
    assert reasons(hopper, FA3, "extend", page_size=64, num_q_heads=4) == [text]
    assert reasons(hopper, FA3, qk_rope_head_dim=32)
    assert reasons(hopper, FA3, kv_lora_rank=256)


def test_a_handle_on_hopper_takes_pages_that_it_reads_right(fa3: Installed) -> None:
    handle = hal.get_mla_attention(num_q_heads=128, device=hardware.device_of("sm_90"), kernel="fa3")
    assert handle.request.page_size == 16
    assert (handle.kernels()["extend"], handle.kernels()["decode"]) == ("fa3.mla_extend", "fa3.mla_decode")


WRAPPER = "BatchMLAPagedAttentionWrapper"
FLASHINFER = {kernel.name: kernel for kernel in flashinfer_mla_kernels.KERNELS}
VERSIONS = [v for v in signatures.versions(flashinfer.LIBRARY) if hal.Version.parse(v).satisfies("<0.7")]


@contextlib.contextmanager
def wrapped(arch: str = "sm_90", version: str = "") -> Iterator[Installed]:
    """flashinfer, in the newest version that is declared unless told otherwise."""
    version = version or VERSIONS[-1]
    functions = flashinfer.emulations(version, arch)
    with (
        hal.simulate(libraries={"torch": "2.13.0", flashinfer.LIBRARY: version}),
        library.installed(flashinfer.LIBRARY, version, functions) as held,
    ):
        yield held
    _idle.clear()


@pytest.mark.parametrize("name", FLASHINFER)
def test_flashinfer_is_right_at_the_corners_of_its_declaration(name: str) -> None:
    with wrapped() as held:
        given = testing.corners(FLASHINFER[name], device=hardware.device_of("sm_90"))
        assert len(given) > 10
        assert [str(r) for r in (hardware.check(FLASHINFER[name], x) for x in given) if not r.ok] == []
        assert held.called(f"{WRAPPER}.run")
        assert {c.arguments["backend"] for c in held.called(f"{WRAPPER}.__init__")} == {name[11:14]}


@pytest.mark.parametrize("version", VERSIONS)
def test_flashinfers_calls_bind_to_the_signatures_of_every_version(version: str) -> None:
    assert len(VERSIONS) > 5
    with wrapped(version=version):
        for name in FLASHINFER:
            result = hardware.check(FLASHINFER[name], request_of(return_lse=True, max_q_len=2, num_q_heads=128))
            assert result.ok, str(result)


@pytest.mark.parametrize("arch", FLASHINFER["flashinfer_fa2.mla_decode"].platforms["nvidia"].only)
def test_flashinfers_path_runs_for_every_arch(arch: str) -> None:
    with wrapped(arch):
        result = hardware.check(FLASHINFER["flashinfer_fa2.mla_decode"], request_of(), arch)
        assert result.ok, str(result)


def test_flashinfer_is_given_one_plan_a_step_and_two_views_of_the_cache() -> None:
    hal.reset()
    with wrapped() as held:
        handle = hal.get_mla_attention(
            num_q_heads=4, dtype="float16", device=hardware.device_of("sm_90"), kernel={"decode": "flashinfer_fa3"}
        )
        cache = handle.allocate_kv_cache(8)
        plan = handle.plan(q_lens=[1, 1], kv_lens=[40, 9], block_table=[[1, 0], [2, 0]], max_batch=3)
        for _ in range(2):
            out = handle(torch.randn(3, 4, 576).half(), cache=cache, plan=plan)
            assert not out[2].any(), "no row has the third token"
        assert len(held.called(f"{WRAPPER}.plan")) == 1
        plan.update(q_lens=[1], kv_lens=[5], block_table=[[3]])
        assert handle(torch.randn(1, 4, 576).half(), cache=cache, plan=plan).shape == (1, 4, 512)
        ran = held.called(f"{WRAPPER}.run")[0].arguments
        assert ran["kpe_cache"].data_ptr() == ran["ckv_cache"].data_ptr() + 2 * 512
        assert held.called(f"{WRAPPER}.plan")[0].arguments["kv_len_arr"].tolist() == [40, 9, 0]
    hal.reset()


@pytest.mark.parametrize(("name", "since"), [("flashinfer_fa3", "0.6.14"), ("flashinfer_fa2", "0.6.18")])
def test_flashinfer_reads_fp8_latents_on_hopper_with_its_scale_on_the_device(
    name: str, since: str
) -> None:  # requirement B6, P38
    kernel = FLASHINFER[f"{name}.mla_decode"]
    wanted = request_of(kv_dtype="float8_e4m3fn", return_lse=True, max_q_len=2)
    new = [v for v in VERSIONS if hal.Version.parse(v).satisfies(f">={since}")]
    for version in new:
        with wrapped(version=version) as held:
            result = hardware.check(kernel, wanted)
            assert result.ok, str(result)
            runs = held.called(f"{WRAPPER}.run")
            assert {(c.arguments["ckv_scale"], c.arguments["kpe_scale"]) for c in runs} == {(1.0, 1.0)}
    assert new
    old = next(v for v in reversed(VERSIONS) if v not in new)
    for device, version, field in (("sm_90", old, "library"), ("sm_100", VERSIONS[-1], "kv_dtype")):
        with hal.simulate(f"nvidia:{device},cuda=13.0", libraries={"torch": "2.13.0", flashinfer.LIBRARY: version}):
            candidates = hal.select(wanted).choices["decode"].candidates
        found = next(c.reasons for c in candidates if c.kernel.name == kernel.name)
        assert field in {r.field for r in found} or (name == "flashinfer_fa3" and device == "sm_100")


def test_a_handle_on_hopper_decodes_fp8_latents_with_flashinfer() -> None:  # requirement B6
    hal.reset()
    with wrapped():
        handle = hal.get_mla_attention(num_q_heads=4, kv_dtype="fp8", device=hardware.device_of("sm_90"))
        assert handle.kernels()["decode"] == "flashinfer_fa3.mla_decode"
        cache = handle.allocate_kv_cache(4, kv_scale=0.5)
        host = hal.get_mla_attention(num_q_heads=4, kv_dtype="float8_e4m3fn", device="cpu", page_size=64)
        there = hal.MlaCache(cache.data, kv_scale=0.5)
        latent, q = torch.randn(1, 576).bfloat16(), torch.randn(1, 4, 576).bfloat16()
        step = {"q_lens": [1], "kv_lens": [1], "block_table": [[2]], "max_batch": 3}
        for made, held in ((handle, cache), (host, there)):
            out = made(q, latent, cache=held, plan=made.plan(**step))
            torch.testing.assert_close(out.float(), latent[:, None, :512].float().expand(1, 4, -1), atol=0.2, rtol=0.07)
    hal.reset()


def test_a_step_that_flashinfers_plan_has_no_room_for_is_an_error() -> None:
    from hal_nvidia import _flashinfer_mla

    with wrapped():
        made = _flashinfer_mla.fa2_decode(request_of(num_q_heads=128), hardware.device_of("sm_90"))
        case = make_case(request_of(num_q_heads=1), "decode", lengths=[(1, 1)])
        step = case.args[2]
        step.q_lens = (1,) * 9000
        with pytest.raises(ValueError, match="16384"):
            made.plan(step)


@pytest.mark.parametrize(("cuda", "fa3", "fa2"), [("11.8", False, False), ("12.2", False, True), ("12.3", True, True)])
def test_flashinfers_fa3_is_for_cuda_12_3_and_newer(cuda: str, fa3: bool, fa2: bool) -> None:  # requirement P25, E1
    with hal.simulate(f"nvidia:sm_90,cuda={cuda}", libraries={"torch": "2.13.0", flashinfer.LIBRARY: "0.6.13"}):
        candidates = hal.select(request_of()).choices["decode"].candidates
    for name, fits in (("flashinfer_fa3.mla_decode", fa3), ("flashinfer_fa2.mla_decode", fa2)):
        codes = [r.code for c in candidates if c.kernel.name == name for r in c.reasons]
        assert codes == ([] if fits else ["runtime_too_old"])


def test_flashinfer_of_0_7_is_refused() -> None:
    with hal.simulate("nvidia:sm_90,cuda=12.8", libraries={"torch": "2.13.0", flashinfer.LIBRARY: "0.7.4"}):
        candidates = hal.select(request_of()).choices["decode"].candidates
    texts = [str(c.reasons[0]) for c in candidates if c.kernel.name in FLASHINFER]
    assert len(texts) == 2
    assert all("0.7" in text for text in texts)
