"""What is refused, and the reasons: archs, builds, versions, features; true to the library, and to nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from emulated import hardware, nvidia

import hal
import hal_nvidia
from hal.errors import InputError
from hal_nvidia import _flash_attn_3_build as builds
from hal_ops.attention import AttentionRequest

FA3, TOKENSPEED, FA2 = {"flash-attn-3": "3.0.0"}, {"tokenspeed-fa3": "3.0.0.post20260810"}, {"flash-attn": "2.8.3"}
FA4 = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"}
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128}


def reasons(
    kernel: str, libraries: dict[str, str], device: str = "nvidia:sm_90,cuda=12.8", **fields: Any
) -> dict[str, str]:
    """Code to text of why a kernel is refused."""
    phase = kernel.rpartition(".")[2]
    with hal.simulate(device, libraries={"torch": "2.13.0", **libraries}):
        selection = hal.select(AttentionRequest(**{**BASE, **fields}, phases=(phase,)))
    candidate = next(c for c in selection.choices[phase].candidates if c.kernel.name == kernel)
    return {r.code: r.text for r in candidate.reasons}


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_100", "sm_103", "sm_120", "sm_121"])
def test_flash_attention_3_runs_on_listed_archs_only(arch: str) -> None:  # requirement E9, D10, E6
    found = reasons("fa3.decode", FA3, f"nvidia:{arch},cuda=13.0")
    assert set(found) >= {"arch_not_listed"}
    assert found["arch_not_listed"] == f"needs sm_80 or sm_90; this is {arch}"


@pytest.mark.parametrize(
    ("cuda", "fits"), [("12.2", False), ("12.3", True), ("12.10", True), ("13.0", True), ("9.4", False)]
)
def test_cuda_is_compared_by_number(cuda: str, fits: bool) -> None:  # requirement E1, E6
    found = reasons("fa3.decode", FA3, f"nvidia:sm_90,cuda={cuda}")
    assert found == ({} if fits else {"runtime_too_old": f"needs cuda >=12.3; this is {cuda}"})


def test_the_missing_package_is_blamed_and_not_the_gpu() -> None:  # requirement E7, P45
    assert set(reasons("fa3.decode", {})) == {"not_installed"}
    assert set(reasons("fa3.decode", FA3, "nvidia:sm_75,cuda=12.8")) == {"arch_not_listed", "build_lacks_arch"}
    both = reasons("fa3.decode", {}, "nvidia:sm_75,cuda=12.8")
    assert set(both) == {"not_installed", "arch_not_listed"}


def test_what_no_build_for_the_arch_has_is_not_promised() -> None:  # requirement P28, D11
    """Only the wheel for sm_90 has sinks: on sm_80 nothing that could be installed would help."""
    found = reasons("fa3.prefill", {}, "nvidia:sm_80,cuda=12.8", sinks=True)
    assert (
        found["feature_unsupported"] == "sinks: flash_attn_varlen_func of upstream's flash-attention 3 takes no sinks"
    )
    wheel = "nvidia:sm_90,cuda=13.0"
    assert set(reasons("fa3.prefill", {}, wheel, sinks=True)) == {"not_installed"}
    for device, torch in (("nvidia:sm_90,cuda=12.8", "2.13.0"), (wheel, "2.8.0")):
        found = reasons("fa3.prefill", {"torch": torch}, device, sinks=True)
        assert set(found) == {"not_installed", "feature_unsupported"}


def test_a_build_without_code_for_the_arch_is_refused() -> None:  # requirement P44
    found = reasons("fa3.prefill", TOKENSPEED, "nvidia:sm_80,cuda=13.0")
    assert found == {"build_lacks_arch": "the installed build is for sm_90, not for sm_80"}
    assert reasons("fa3.prefill", FA3, "nvidia:sm_80,cuda=12.8") == {}


@pytest.mark.parametrize(
    ("fields", "upstream", "wheel"),
    [
        ({"sinks": True}, "sinks: flash_attn_varlen_func of flash-attn-3 3.0.0 takes no sinks", ""),
        ({"softcap": 20.0}, "", "softcap: tokenspeed-fa3 3.0.0.post20260810 was built without softcap"),
        ({"needs_grad": True}, "", "needs_grad: tokenspeed-fa3 3.0.0.post20260810 was built without the backward pass"),
        (
            {"head_dim": 192, "v_head_dim": 128}, "",
            "v_head_dim 128 with head_dim 192: tokenspeed-fa3 3.0.0.post20260810 was built without unequal head dims",
        ),
        ({"alibi": True}, "alibi: fa3.prefill does not declare it", "alibi: fa3.prefill does not declare it"),
    ],
    ids=["sinks", "softcap", "gradients", "dims", "alibi"],
)  # fmt: skip
def test_variants_are_told_apart(fields: dict[str, Any], upstream: str, wheel: str) -> None:  # requirement D11, P22
    for libraries, text in ((FA3, upstream), (TOKENSPEED, wheel)):
        found = reasons("fa3.prefill", libraries, "nvidia:sm_90,cuda=13.0", **fields)
        assert list(found.values()) == ([text] if text else [])


def test_an_fp8_cache_needs_the_permission_for_fp8_queries() -> None:  # requirement B7, P26
    cache = {"kv_dtype": "float8_e4m3fn", "page_size": 16}
    assert "fp8_query True" in reasons("fa3.decode", FA3, **cache)["dtype"]
    assert reasons("fa3.decode", FA3, **cache, fp8_query=True) == {}
    assert set(reasons("fa3.decode", FA3, "nvidia:sm_80,cuda=12.8", **cache, fp8_query=True)) == {"dtype"}
    assert set(reasons("fa3.decode", FA3, kv_dtype="float8_e5m2", page_size=16, fp8_query=True)) == {"dtype"}
    assert set(reasons("fa2.decode", FA2, kv_dtype="float8_e4m3fn", page_size=256, fp8_query=True)) == {"dtype"}


@pytest.mark.parametrize(
    ("kernel", "fields", "fits"),
    [
        ("fa3.extend", {"page_size": 64}, True),
        ("fa3.extend", {"page_size": 128}, False),
        ("fa3.extend", {"page_size": 64, "head_dim": 256, "window": 8}, False),
        ("fa3.decode", {"page_size": 256}, True),
        ("fa3.decode", {"page_size": 256, "max_q_len": 32}, False),
        ("fa2.extend", {"page_size": 256}, True),
        ("fa2.extend", {"page_size": 16}, False),
    ],
)
def test_page_sizes_that_would_be_wrong_are_refused(kernel: str, fields: dict[str, Any], fits: bool) -> None:
    # requirement D15, B5, E6
    found = reasons(kernel, {**FA2, **FA3}, **fields)
    assert set(found) == (set() if fits else {"page_size"})


def test_limits_are_those_of_each_kernel() -> None:  # requirement B5
    assert reasons("fa2.prefill", FA2, head_dim=256) == {}
    assert reasons("sdpa_efficient.prefill", {}, head_dim=320, num_kv_heads=8) == {}
    assert set(reasons("fa2.prefill", FA2, head_dim=320)) == {"head_dim"}
    assert set(reasons("fa3.decode", FA3, head_dim=100)) == {"head_dim"}
    assert set(reasons("sdpa_cudnn.prefill", {}, head_dim=256)) == {"head_dim"}
    assert set(reasons("sdpa_efficient.prefill", {}, dtype="bfloat16", num_kv_heads=8, device="nvidia:sm_75")) == {
        "dtype"
    }


@pytest.mark.parametrize("feature", ["window", "softcap", "sinks", "alibi", "needs_grad", "graph", "return_lse"])
def test_a_feature_is_declared_or_refused(feature: str) -> None:  # requirement P22, C7, X5
    values = {"window": 8, "softcap": 9.0}
    for kernel in hal_nvidia.NvidiaPlatform().kernels():
        if kernel.op != "attention" or kernel.library not in (*nvidia.LIBRARIES, *nvidia.OPERATORS):
            continue
        request = AttentionRequest(**BASE, **{feature: values.get(feature, True)}, phases=(kernel.phase,))
        refused = [r for r in hal._eligibility._fields(kernel, request) if r.field == feature]
        assert bool(refused) == (feature not in kernel.fields), kernel.name


def test_adapters_take_no_keywords_that_nobody_reads() -> None:  # requirement P24, A4
    folder = Path(hal_nvidia.__file__).parent
    for path in sorted(folder.glob("_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                assert node.args.kwarg is None, f"{path.name}:{node.lineno} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize(
    "name", ["fa2.prefill", "fa3.prefill", "sdpa_flash.prefill", "sdpa_efficient.prefill", "sdpa_cudnn.prefill"]
)
def test_a_tensor_that_was_not_requested_is_an_error(name: str) -> None:  # requirement C7, P24
    import torch

    x = torch.zeros(1, 3, 2, 64).half()
    with nvidia.running(name.partition(".")[0]):
        request = AttentionRequest(num_q_heads=2, num_kv_heads=2, head_dim=64, dtype="float16", phases=("prefill",))
        prefill = hardware.build(name, request)
        for tensor in ("sinks", "alibi_slopes"):
            with pytest.raises(ValueError, match="request it"):
                prefill(x, x, x, **{tensor: torch.ones(2)})


def test_a_cache_in_the_other_layout_is_an_error() -> None:  # requirement D8, P32
    import torch

    with nvidia.running("fa3") as held:
        attention = hal.get_attention(
            num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", page_size=16, kv_layout="NHD",
            device=hardware.device_of("sm_90"), kernel="fa3",
        )  # fmt: skip
        plan = attention.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
        pages = torch.zeros(1, 2, 16, 64).half()
        with pytest.raises(InputError, match="HND"):
            attention(torch.zeros(1, 4, 64).half(), cache=hal.KVCache(pages, pages, layout="HND"), plan=plan)
        assert held is not None
        assert held.called("flash_attn_with_kvcache") == []


def test_a_broken_package_is_blamed_with_its_own_words() -> None:  # requirement P47, B11, E6
    """flash-attn is there by its metadata, and its extension is not."""
    with hal.simulate(libraries={"torch": "2.13.0", **FA2}), pytest.raises(hal.errors.NoKernelError) as caught:
        hal.get_attention(**BASE, phases="prefill", device=hardware.device_of("sm_80"), kernel="fa2")
    assert "No module named 'flash_attn_2_cuda'" in str(caught.value)
    hal._selection.failures.clear()


CUDNN_13, CUDNN_12 = "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"


@pytest.mark.parametrize(
    ("arch", "libraries", "fields", "refused"),
    [
        *((arch, {}, {"num_kv_heads": 7, "num_q_heads": 7}, arch != "sm_90") for arch in ("sm_90", "sm_100", "sm_103")),
        *((arch, {}, {"num_kv_heads": 8, "num_q_heads": 8}, False) for arch in ("sm_90", "sm_100", "sm_103")),
        *(("sm_90", {name: "9.26.0.51"}, {"needs_grad": True}, True) for name in (CUDNN_12, CUDNN_13)),
        *(("sm_90", {name: "9.25.1.1"}, {"needs_grad": True}, True) for name in (CUDNN_12, CUDNN_13)),
        *(("sm_90", {name: "9.25.1.1"}, {}, False) for name in (CUDNN_12, CUDNN_13)),
        *(("sm_90", {name: "9.19.0.56"}, {"needs_grad": True}, False) for name in (CUDNN_12, CUDNN_13)),
    ],
)
def test_versions_of_cudnn_that_are_wrong_are_refused(
    arch: str, libraries: dict[str, str], fields: dict[str, Any], refused: bool
) -> None:  # requirement D13
    found = reasons("sdpa_cudnn.prefill", libraries, f"nvidia:{arch},cuda=13.0", **fields)
    assert set(found) == ({"version_known_bad"} if refused else set())


@pytest.mark.parametrize(
    ("name", "libraries", "fields", "served"),
    [
        ("sdpa_cudnn.prefill", {}, {"causal": False}, {"needs_grad": False}),
        ("sdpa_cudnn.prefill", {}, {"causal": False}, {"causal": True}),
        ("sdpa_cudnn.prefill", {}, {"causal": False, "num_kv_heads": 8}, {"device": "nvidia:sm_100,cuda=13.0"}),
        ("fa4.prefill", FA4, {"head_dim": 192, "v_head_dim": 128}, {"needs_grad": False}),
        ("fa4.prefill", FA4, {"head_dim": 192, "v_head_dim": 128}, {"num_kv_heads": 8}),
    ],
)
def test_gradients_that_a_kernel_gets_wrong_are_refused(
    name: str, libraries: dict[str, str], fields: dict[str, Any], served: dict[str, Any]
) -> None:  # requirement B5, D13, C7
    """As ``tests/gpu/test_long_libraries.py`` found them on an H200: NaN from cuDNN, an assertion of flash-attention 4."""
    fields = {**fields, "needs_grad": True}
    assert set(reasons(name, libraries, **fields)) == {"feature_unsupported"}
    assert reasons(name, libraries, **{**fields, **served}) == {}


INTERFACE = "def flash_attn_varlen_func(q, k, v{more}):\n    ...\ndef flash_attn_with_kvcache(q{sinks}):\n    ...\n"
CONFIG = "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_FP8': True, 'FLASHATTENTION_DISABLE_HDIM256': True, "
CONFIG += "'FLASH_ATTENTION_DISABLE_HDIMDIFF64': False, 'FLASHATTENTION_DISABLE_SM8x': False}}\n"


@pytest.fixture
def installed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the files of a build, and makes it the one that is installed."""

    def write(more: str = ", return_attn_probs=False", sinks: str = ", sinks=None") -> None:
        (tmp_path / "flash_attn_interface.py").write_text(INTERFACE.format(more=more, sinks=sinks))
        (tmp_path / "flash_attn_config.py").write_text(CONFIG)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(builds, "_really_installed", lambda name: "3.0.0" if name == "flash-attn-3" else "")
        builds._build.cache_clear()

    yield write
    builds._build.cache_clear()


def test_a_build_is_read_from_its_files_and_not_imported(installed_build: Any) -> None:  # requirement P44, E6
    import sys

    installed_build()
    with hal.simulate(libraries=FA3):
        found = builds.build()
    assert found == builds.Build("flash-attn-3 3.0.0", frozenset({"FP8", "HDIM256"}), sinks=True)
    assert (found.largest_head_dim, found.archs) == (192, {"sm_80", "sm_90"})
    assert "flash_attn_interface" not in sys.modules
    assert set(reasons("fa3.prefill", FA3, head_dim=256)) == {"head_dim"}
    assert reasons("fa3.prefill", FA3, sinks=True) == {}


def test_a_build_that_always_returns_the_lse_is_too_old(installed_build: Any) -> None:  # requirement E6, D13
    installed_build(more="")
    found = reasons("fa3.prefill", FA3)
    assert "before 2025-08-29" in found["version_too_old"]


def test_the_known_build_of_the_wheel_is_the_one_it_ships() -> None:  # requirement P44
    """Where the wheel is installed, what stands in for it in simulations is compared with its files."""
    try:
        version = importlib.metadata.version("tokenspeed-fa3")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tokenspeed-fa3 is not installed")
    real = builds._build("tokenspeed-fa3", version)
    assert real == builds.dataclasses.replace(builds._KNOWN["tokenspeed-fa3"], name=real.name)
