"""What flashinfer's and flash-attn 4's kernels are refused for, and the reasons; and what is chosen where."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import hal
import hal_nvidia
from hal.testing import make_platform
from hal_nvidia import flash_attn_4_kernels, flashinfer_kernels, flashinfer_op_kernels, flashinfer_trtllm_kernels
from hal_ops.attention import AttentionRequest
from hal_ops.rms_norm import RmsNormRequest

FLASHINFER = {"flashinfer-python": "0.6.13"}
NEWEST = {"flashinfer-python": "0.7.2.post1", "nvidia-cudnn-frontend": "1.32.0"}
FA4 = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"}
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}
GEMMA: dict[str, Any] = {"softcap": 50.0, "head_dim": 256}
GPT_OSS: dict[str, Any] = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 64, "sinks": True}
KERNELS = {
    k.name: k
    for module in (flashinfer_kernels, flashinfer_trtllm_kernels, flash_attn_4_kernels, flashinfer_op_kernels)
    for k in module.KERNELS
}


def selection(device: str, libraries: dict[str, str], **fields: Any) -> hal.Selection:
    with hal.simulate(device, libraries={"torch": "2.13.0", **libraries}):
        return hal.select(AttentionRequest(**{**BASE, **fields}))


def reasons(kernel: str, libraries: dict[str, str], device: str, **fields: Any) -> dict[str, str]:
    """Code to text of why a kernel is refused."""
    phase = KERNELS[kernel].phase
    choice = selection(device, libraries, phases=(phase,), **fields).choices[phase]
    candidate = next(c for c in choice.candidates if c.kernel.name == kernel)
    return {r.code: r.text for r in candidate.reasons}


def chosen(device: str, libraries: dict[str, str], **fields: Any) -> dict[str, Any]:
    return dict(selection(device, libraries, **fields).kernels())


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "sm_103", "sm_120"])
def test_fa3_is_for_hopper_and_trtllm_for_blackwell_s_datacenter_chips(arch: str) -> None:  # requirement D10, E9
    device = f"nvidia:{arch},cuda=13.0"
    assert "arch_not_listed" in reasons("flashinfer_fa3.extend", FLASHINFER, device)
    listed = reasons("trtllm_gen.decode", NEWEST, device, kv_layout="HND")
    assert ("arch_not_listed" in listed) == (arch not in ("sm_100", "sm_103"))
    assert reasons("flashinfer_fa2.decode", FLASHINFER, device) == {}


def test_sinks_are_for_kernels_that_apply_them() -> None:  # requirement D11, C7, P22
    hopper = "nvidia:sm_90,cuda=13.0"
    for name in ("flashinfer_fa2.decode", "flashinfer_fa3.extend", "flashinfer_fa2.prefill"):
        assert "does not declare it" in reasons(name, FLASHINFER, hopper, sinks=True)["feature_unsupported"]
    assert reasons("flashinfer_sink.decode", FLASHINFER, hopper, **GPT_OSS) == {}
    assert set(reasons("flashinfer_sink.decode", FLASHINFER, hopper, **{**GPT_OSS, "sinks": False})) == {
        "feature_unsupported"
    }
    assert set(reasons("flashinfer_sink.extend", FLASHINFER, hopper, **{**GPT_OSS, "head_dim": 128})) == {"head_dim"}
    for arch, can in (("sm_90", True), ("sm_100", True), ("sm_120", False), ("sm_80", False)):
        name = {"sm_90": "fa4.prefill", "sm_100": "fa4.prefill_sm100"}.get(arch, "fa4.prefill_sm80")
        assert (reasons(name, FA4, f"nvidia:{arch},cuda=13.0", **GPT_OSS) == {}) == can


@pytest.mark.parametrize("version", ["0.6.7", "0.6.13", "0.6.15.post1"])
def test_fmha_v2_of_known_bad_versions_is_refused_with_the_report(version: str) -> None:  # requirement D13
    device = "nvidia:sm_120,cuda=13.0"
    found = reasons("fmha_v2.prefill", {"flashinfer-python": version}, device)
    assert set(found) == {"version_known_bad"}
    assert "max_kv_len below 16" in found["version_known_bad"]
    assert reasons("fmha_v2.prefill", {"flashinfer-python": "0.6.16"}, device) == {}
    other = hal.simulate(device, libraries={"torch": "2.13.0", "flashinfer-python": version})
    with other:
        choice = hal.select(AttentionRequest(**BASE, phases=("prefill",))).choices["prefill"]
    (bad,) = (c for c in choice.candidates if c.kernel.name == "fmha_v2.prefill")
    assert bad.reasons[0].remedy == "see https://github.com/flashinfer-ai/flashinfer/pull/3106"


def test_the_row_speaks_of_a_stranger_s_paged_kernel_too() -> None:  # requirement D13
    """A plugin that adapts the paged layouts is held by the row that ships with NVIDIA's platform."""
    kernel = hal.Kernel(
        name="fmha_v2.extend", op="attention", phase="extend", target="nowhere:extend", priority=hal.Band.PLUGIN,
        platforms={"nvidia": hal.Archs(only=("sm_120",))},
        fields={n: hal.Anything() for n, rule in AttentionRequest.rules().items() if rule.required},
    )  # fmt: skip
    from hal import _plugins

    with _plugins.temporary_plugin("stranger", make_platform("stranger", kernels=(kernel,), devices=())):
        for version, code in (("0.6.15", {"version_known_bad"}), ("0.6.16", set())):
            with hal.simulate("nvidia:sm_120,cuda=13.0", libraries={"flashinfer-python": version}):
                choice = hal.select(AttentionRequest(**BASE, phases=("extend",))).choices["extend"]
            (found,) = (c for c in choice.candidates if c.kernel.name == "fmha_v2.extend")
            assert {r.code for r in found.reasons} == code


@pytest.mark.parametrize(
    ("arch", "least"), [("sm_100", "12.8"), ("sm_103", "12.9"), ("sm_120", "12.9"), ("sm_121", "12.9")]
)
def test_the_compiler_must_know_the_arch(arch: str, least: str) -> None:  # requirement E1, E6, P44
    for cuda in ("12.7", "12.8", "12.9"):
        fits = hal.Version.parse(cuda).satisfies(f">={least}")
        found = reasons("flashinfer_fa2.decode", FLASHINFER, f"nvidia:{arch},cuda={cuda}")
        text = f"compiling for {arch} needs CUDA >={least}; this is {cuda}"
        assert found == ({} if fits else {"runtime_too_old": text})
        newest_fits = fits or (arch, cuda) == ("sm_120", "12.8")
        assert (reasons("flashinfer_fa2.decode", NEWEST, f"nvidia:{arch},cuda={cuda}") == {}) == newest_fits


@pytest.mark.parametrize("version", ["0.5.3", "0.6.13", "0.7.4"])
def test_fa3_is_for_cuda_12_3_and_newer(version: str) -> None:  # requirement E1, E6, P25, P44
    """As flashinfer's own choice of a backend has it; and nothing for sm_90a is compiled before CUDA 12.0."""
    libraries = {"flashinfer-python": version}
    by_kernel: dict[str, dict[str, Any]] = {
        "flashinfer_fa3.prefill": {},
        "flashinfer_fa3.extend": {},
        "flashinfer_sink.extend": GPT_OSS,
        "flashinfer_fa2.extend": {},
        "flashinfer_sink.decode": GPT_OSS,
    }
    for name, fields in by_kernel.items():
        is_fa3 = "fa3" in name or name == "flashinfer_sink.extend"
        needs = "sm_90 with the backend fa3 needs CUDA >=12.3" if is_fa3 else "sm_90 needs CUDA >=12.0"
        for cuda in ("11.8", "12.2", "12.3", "12.10", "13.0"):
            fits = cuda not in (("11.8", "12.2") if is_fa3 else ("11.8",))
            found = reasons(name, libraries, f"nvidia:sm_90,cuda={cuda}", **fields)
            assert found == ({} if fits else {"runtime_too_old": f"compiling for {needs}; this is {cuda}"})
    assert reasons("flashinfer_sink.extend", libraries, "nvidia:sm_80,cuda=11.8", **GPT_OSS) == {}


def test_an_fp8_cache_on_blackwell_takes_the_queries_that_its_version_reads() -> None:  # requirement B7, D13, P26, P28
    device = "nvidia:sm_100,cuda=13.0"
    cache = {"kv_dtype": "float8_e4m3fn", "kv_layout": "HND", "page_size": 32}
    older = reasons("trtllm_gen.decode", FLASHINFER, device, **cache)
    assert older["version_too_old"].startswith("bfloat16 queries over an FP8 cache need flashinfer-python >=0.6.18")
    assert reasons("trtllm_gen.decode", NEWEST, device, **cache) == {}
    assert set(reasons("trtllm_gen.extend", NEWEST, device, **cache)) == {"dtype"}
    for name in ("trtllm_gen.extend", "trtllm_gen.decode"):
        assert reasons(name, FLASHINFER, device, **cache, fp8_query=True) == {}
        assert set(reasons(name, FLASHINFER, device, **cache, fp8_query=True, dtype="float16")) == {"dtype"}
        assert set(reasons(name, NEWEST, device, **cache, fp8_query=True, kv_scale="head")) == {"feature_unsupported"}


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
def test_many_drafts_in_a_window_over_an_fp8_cache_are_refused(arch: str) -> None:  # requirement D13, P26
    device = f"nvidia:{arch},cuda=13.0"
    bad: dict[str, Any] = {
        "kv_dtype": "float8_e4m3fn",
        "kv_layout": "HND",
        "page_size": 32,
        "window": (127, 0),
        "max_q_len": 8,
    }
    assert "flashinfer#3864" in reasons("trtllm_gen.decode", NEWEST, device, **bad)["check"]
    for good in ({"max_q_len": 4}, {"fp8_query": True}, {"window": (None, None)}, {"kv_dtype": "bfloat16"}):
        assert reasons("trtllm_gen.decode", NEWEST, device, **{**bad, **good}) == {}


def test_layouts_and_pages_are_those_that_kernels_read() -> None:  # requirement D8, P32, B5
    device = "nvidia:sm_100,cuda=13.0"
    assert set(reasons("trtllm_gen.extend", NEWEST, device, kv_layout="NHD")) == {"layout"}
    assert set(reasons("trtllm_gen.extend", NEWEST, device, kv_layout="HND", page_size=128)) == {"page_size"}
    hopper = "nvidia:sm_90,cuda=13.0"
    assert reasons("fa4.extend", FA4, hopper, page_size=128)["page_size"] == "page_size 128; needs 16, 32, 64 or 256"
    assert set(reasons("fa4.extend", FA4, hopper, head_dim=256)) == {"head_dim"}
    assert reasons("fa4.prefill", FA4, hopper, head_dim=256) == {}
    assert set(reasons("fa4.prefill_sm100", FA4, device, head_dim=256)) == {"head_dim"}
    assert reasons("flashinfer_fa2.extend", FLASHINFER, hopper, page_size=48) == {}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_120", "sm_121"])
def test_flash_attention_4_has_pages_on_hopper_and_blackwell_alone(arch: str) -> None:  # requirement B5, D10
    for name in ("fa4.extend", "fa4.extend_sm100", "fa4.decode"):
        assert "arch_not_listed" in reasons(name, FA4, f"nvidia:{arch},cuda=13.0")
    assert reasons("fa4.prefill_sm80", FA4, f"nvidia:{arch},cuda=13.0") == {}
    assert set(reasons("fa4.prefill_sm80", FA4, f"nvidia:{arch},cuda=13.0", needs_grad=True)) == {"feature_unsupported"}


def test_a_library_s_own_needs_are_needs() -> None:  # requirement P45, D13, B11
    hopper = "nvidia:sm_90,cuda=13.0"
    only = {"flash-attn-4": "4.0.0b36"}
    assert set(reasons("fa4.prefill", only, hopper)) == {"not_installed"}
    old = reasons("fa4.prefill", {**FA4, "nvidia-cutlass-dsl": "4.6.1"}, hopper)
    assert "4.0.0b27 and later are written for it" in old["version_too_old"]
    assert set(reasons("fa4.prefill", {**FA4, "flash-attn-4": "4.0.0b22"}, hopper)) == {"version_too_old"}
    assert set(reasons("flashinfer_fa2.decode", {}, hopper)) == {"not_installed"}


@pytest.mark.parametrize("name", ["flashinfer_cudnn.extend", "flashinfer_cudnn.decode"])
def test_cudnn_is_for_versions_that_tell_its_graphs_apart(name: str) -> None:  # requirement D13, E6
    for version, fits in (("0.6.13", False), ("0.7.1", False), ("0.7.2", True)):
        libraries = {**NEWEST, "flashinfer-python": version}
        found = reasons(name, libraries, "nvidia:sm_100,cuda=13.0", kv_layout="HND")
        assert set(found) == (set() if fits else {"version_too_old"}), version
        assert fits or "found by shape alone" in found["version_too_old"]


@pytest.mark.parametrize(
    "name", ["fa4.prefill", "fa4.prefill_sm100", "fa4.prefill_sm80", "fa4.extend", "fa4.decode_sm100"]
)
def test_flash_attention_4_has_scales_of_a_usual_size(name: str) -> None:  # requirement B5, P22
    arch = {"sm100": "sm_100", "sm80": "sm_80"}.get(name.partition("_")[2], "sm_90")
    for scale, fits in ((2**-9, False), (2**-8, True), (8.0, True), (9.0, False)):
        found = reasons(name, FA4, f"nvidia:{arch},cuda=13.0", softmax_scale=scale, page_size=16)
        assert set(found) == (set() if fits else {"feature_unsupported"}), scale


def test_fp8_is_declared_where_it_is_read_rightly() -> None:  # requirement B7, P26, P31
    hopper = "nvidia:sm_90,cuda=13.0"
    for name, fields in (
        ("flashinfer_fa3.extend", {}), ("fa4.extend", {}), ("flashinfer_fa2.extend", {"head_dim": 64}),
        ("xqa.decode", {}),
    ):  # fmt: skip
        libraries = {**FA4, **(NEWEST if name == "xqa.decode" else FLASHINFER)}
        assert set(reasons(name, libraries, hopper, kv_dtype="float8_e4m3fn", page_size=16, **fields)) == {"dtype"}
    assert reasons("flashinfer_fa2.extend", FLASHINFER, hopper, kv_dtype="float8_e4m3fn", kv_scale="head") == {}


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_xqa_over_fp8_is_refused_on_hopper_alone(head_dim: int) -> None:  # requirement B7, D15
    fields: dict[str, Any] = {"head_dim": head_dim, "kv_dtype": "float8_e4m3fn", "fp8_query": True, "page_size": 16}
    found = reasons("xqa.decode", NEWEST, "nvidia:sm_90,cuda=13.0", **fields)
    assert set(found) == {"dtype"}
    assert "NaN in unused slots" in found["dtype"]
    assert reasons("xqa.decode", NEWEST, "nvidia:sm_120,cuda=13.0", **fields) == {}
    assert reasons("xqa.decode", NEWEST, "nvidia:sm_90,cuda=13.0", head_dim=head_dim, page_size=16) == {}


def test_what_is_chosen() -> None:  # requirement B2, B13, D10
    for device, libraries, fields, wanted in (
        ("nvidia:sm_90,cuda=13.0", FLASHINFER, {}, ("flashinfer_fa3", "flashinfer_fa3", "flashinfer_fa2")),
        ("nvidia:sm_90,cuda=13.0", FLASHINFER, GEMMA, ("flashinfer_fa3", "flashinfer_fa3", "flashinfer_fa2")),
        ("nvidia:sm_100,cuda=13.0", NEWEST, {"page_size": 64}, (None, "trtllm_gen", "trtllm_gen")),
        ("nvidia:sm_100,cuda=13.0", {**NEWEST, **FA4}, {"page_size": 64}, ("fa4", "trtllm_gen", "trtllm_gen")),
        ("nvidia:sm_100,cuda=13.0", FA4, {"page_size": 64}, ("fa4", "fa4", "fa4")),
        ("nvidia:sm_120,cuda=13.0", NEWEST, {}, ("fmha_v2", "flashinfer_fa2", "flashinfer_fa2")),
        ("nvidia:sm_90,cuda=13.0", FLASHINFER, GPT_OSS, (None, "flashinfer_sink", "flashinfer_sink")),
        ("nvidia:sm_90,cuda=13.0", NEWEST, {"head_dim": 96, "page_size": 16}, (None, None, "xqa")),
    ):  # fmt: skip
        found = chosen(device, libraries, **fields)
        for phase, name in zip(("prefill", "extend", "decode"), wanted, strict=True):
            assert name is None or str(found[phase]).startswith(f"{name}."), (device, fields, found)


def test_forcing_the_library_takes_the_declaration_of_the_arch() -> None:  # requirement B1, C1, P34
    for arch, suffix in (("sm_90", ""), ("sm_100", "_sm100"), ("sm_120", "_sm80")):
        with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries={"torch": "2.13.0", **FA4}):
            request = AttentionRequest(**BASE, phases=("prefill",))
            assert hal.select(request, kernel="fa4").kernels() == {"prefill": f"fa4.prefill{suffix}"}


def test_kernels_for_rows_are_taken_before_torch_s_operators() -> None:
    with hal.simulate("nvidia:sm_90,cuda=13.0", libraries={"torch": "2.13.0", **FLASHINFER}):
        found = hal.select(RmsNormRequest(hidden_size=4096))
        assert found.kernels() == {"call": "flashinfer.rms_norm"}


@pytest.mark.parametrize("module", sorted(Path(hal_nvidia.__file__).parent.glob("_fl*.py")), ids=lambda p: p.name)
def test_adapters_swallow_no_keywords(module: Path) -> None:  # requirement P24, A4
    tree = ast.parse(module.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    assert functions
    assert [f for f in functions if f.args.kwarg is not None] == []


def test_declarations_import_no_library() -> None:  # requirement B11, P40
    import subprocess
    import sys

    code = (
        "import hal_nvidia, sys; print(len(tuple(hal_nvidia.NvidiaPlatform().kernels())) > 30, "
        "{'torch', 'flashinfer', 'flash_attn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True set()"
