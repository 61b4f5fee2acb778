"""What is asked of each version and distribution of a library: torch, CUDA, archs; and that names agree."""

from __future__ import annotations

from typing import Any

import pytest
from emulated import flash_attn_4, signatures

import hal
from hal import _plugins
from hal._libraries import normalize
from hal_ops.attention import AttentionRequest

FA3, FA4 = {"flash-attn-3": "3.0.0"}, {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"}
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}


def reasons(kernel: str, libraries: dict[str, str], device: str, **fields: Any) -> dict[str, str]:
    """Code to text of why a kernel is refused."""
    phase = kernel.rpartition(".")[2].partition("_")[0]
    with hal.simulate(device, libraries={"torch": "2.13.0", **libraries}):
        selection = hal.select(AttentionRequest(**{**BASE, **fields}, phases=(phase,)))
    candidate = next(c for c in selection.choices[phase].candidates if c.kernel.name == kernel)
    return {r.code: r.text for r in candidate.reasons}


@pytest.mark.parametrize("kernel", ["fa2.prefill", "fa2.extend", "fa2.decode"])
@pytest.mark.parametrize("arch", ["sm_100", "sm_103", "sm_120", "sm_121"])
def test_flash_attention_2_has_code_for_blackwell_since_2_7_3(kernel: str, arch: str) -> None:  # requirement P44, P45
    """By setup.py of each version, which builds no PTX; and with CUDA 12.8."""
    device, paged = f"nvidia:{arch},cuda=12.8", {"page_size": 256}
    for version in ("2.7.0.post2", "2.7.2.post1"):
        text = f"code for {arch} needs flash-attn >=2.7.3; {version} is installed"
        assert reasons(kernel, {"flash-attn": version}, device, **paged) == {"version_too_old": text}
        assert reasons(kernel, {"flash-attn": version}, "nvidia:sm_90,cuda=12.8", **paged) == {}
        old = reasons(kernel, {"flash-attn": version}, f"nvidia:{arch},cuda=12.4", **paged)
        assert set(old) == {"runtime_too_old", "version_too_old"}
    assert reasons(kernel, {"flash-attn": "2.7.3"}, device, **paged) == {}
    found = reasons(kernel, {"flash-attn": "2.7.3"}, f"nvidia:{arch},cuda=12.4", **paged)
    assert found == {"runtime_too_old": f"code for {arch} is built with CUDA >=12.8 only; this is 12.4"}


def test_flash_attention_2_has_code_for_hopper_with_cuda_11_8() -> None:  # requirement P44, E1
    old = {"flash-attn": "2.7.0.post2"}
    assert set(reasons("fa2.prefill", old, "nvidia:sm_90,cuda=11.7")) == {"runtime_too_old"}
    assert reasons("fa2.prefill", old, "nvidia:sm_90,cuda=11.8") == {}
    assert reasons("fa2.prefill", old, "nvidia:sm_89,cuda=11.7") == {}


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
@pytest.mark.parametrize("version", ["3.0.0.post20251110", "3.0.0.post20260408", "3.0.0.post20260810"])
def test_the_wheel_needs_the_torch_and_the_cuda_that_it_was_made_for(phase: str, version: str) -> None:
    # requirement P25, P45, E6
    """It is linked with libcudart.so.13, and torch before 2.9 lacks functions of the ABI that it was made for."""
    name, wheel, hopper = f"fa3.{phase}", {"tokenspeed-fa3": version}, "nvidia:sm_90,cuda=13.0"
    label = f"tokenspeed-fa3 {version}"
    assert reasons(name, wheel, hopper) == reasons(name, {**wheel, "torch": "2.9.0"}, "nvidia:sm_90,cuda=13.2") == {}
    linked = f"{label} is linked with libcudart.so.13, of CUDA 13; this is "
    assert reasons(name, wheel, "nvidia:sm_90,cuda=12.8") == {"runtime_too_old": f"{linked}12.8"}
    assert reasons(name, wheel, "nvidia:sm_90,cuda=14.0") == {"check": f"{linked}14.0"}
    old = f"{label} is made for the stable ABI of torch >=2.9; 2.8.0 is installed"
    assert reasons(name, {**wheel, "torch": "2.8.0"}, hopper) == {"version_too_old": old}
    upstream = {**FA3, "torch": "2.8.0"}
    assert reasons(name, upstream, "nvidia:sm_90,cuda=12.8") == reasons(name, upstream, hopper) == {}
    assert set(reasons(name, {**FA3, "torch": "2.5.1"}, hopper)) == {"version_too_old"}


def test_the_first_wheel_has_no_sinks() -> None:  # requirement D11
    for version, fits in (("3.0.0.post20251110", False), ("3.0.0.post20260408", True)):
        found = reasons("fa3.decode", {"tokenspeed-fa3": version}, "nvidia:sm_90,cuda=13.0", sinks=True)
        assert set(found) == (set() if fits else {"feature_unsupported"})


@pytest.mark.parametrize("platform", ["nvidia", "rocm", "musa"])
def test_a_library_goes_by_the_same_distributions_everywhere(platform: str) -> None:  # requirement P45, E7
    """What the list of libraries finds installed, kernels find too."""
    known = {library.name: library for library in _plugins.registry().platforms[platform].libraries()}
    needs = [n for k in _plugins.registry().kernels.values() if set(k.platforms) == {platform} for n in k.needs]
    assert needs
    for need in (n for n in needs if n.library in known):
        assert set(map(normalize, need.names())) == set(map(normalize, known[need.library].names())), need.library


@pytest.mark.parametrize("version", signatures.versions("tokenspeed-fa4"))
def test_tokenspeed_fa4_is_flash_attn_4(version: str) -> None:  # requirement P45, E7
    held = {"tokenspeed-fa4": version, "nvidia-cutlass-dsl": "4.8.0"}
    for name, arch in (("fa4.prefill", "sm_90"), ("fa4.decode_sm100", "sm_100"), ("fa4.prefill_sm100", "sm_103")):
        assert reasons(name, held, f"nvidia:{arch},cuda=13.0", page_size=64) == {}
    assert signatures.functions("tokenspeed-fa4", version) == signatures.functions("flash-attn-4", "4.0.0b27")


def test_tokenspeed_fa4_of_before_4_0_0b27_is_refused() -> None:  # requirement P45, E6
    """It counts by dates, so that a bound on betas says nothing of it."""
    old = {"tokenspeed-fa4": "4.0.0.post20260710", "nvidia-cutlass-dsl": "4.8.0"}
    for name in ("fa4.prefill", "fa4.extend"):
        found = reasons(name, old, "nvidia:sm_90,cuda=13.0", page_size=64)
        assert found == {
            "version_too_old": "needs tokenspeed-fa4 >=4.0.0.post20260815, which is flash-attn-4 4.0.0b27; "
            "4.0.0.post20260710 is installed"
        }
        assert reasons(name, {**old, **FA4}, "nvidia:sm_90,cuda=13.0", page_size=64) == {}


@pytest.mark.parametrize("version", flash_attn_4.VERSIONS)
def test_flash_attention_4_has_no_place_for_the_scales_of_fp8(version: str) -> None:  # requirement P22, B7
    """Its kernels for sm_10x read e4m3; without scales that is no cache. With a parameter for them, declare it."""
    for name, found in signatures.functions(flash_attn_4.distribution(version), version).items():
        assert [p for p in found.parameters if "scale" in p] == ["softmax_scale"], name
    fp8 = {"kv_dtype": "float8_e4m3fn", "fp8_query": True, "page_size": 64}
    for arch in ("sm_100", "sm_103"):
        device = f"nvidia:{arch},cuda=13.0"
        assert set(reasons("fa4.decode_sm100", FA4, device, **fp8)) == {"dtype"}
        assert set(reasons("fa4.extend_sm100", FA4, device, **fp8)) == {"dtype"}
        assert set(reasons("fa4.prefill_sm100", FA4, device, qkv_dtype="float8_e4m3fn")) == {"dtype"}


def test_what_is_left_out_names_where_it_was_looked_for() -> None:  # requirement P22
    page = (signatures.ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    section = page.partition("## Left out")[2].partition("\n## ")[0]
    for words in ("flash_attn/cute/interface.py", "_flash_attn_fwd", *signatures.versions("flash-attn-4")):
        assert words in section
