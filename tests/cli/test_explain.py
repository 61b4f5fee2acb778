"""``hal explain``: options from the request, what-if, forcing, and the answer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest

import hal
from hal._lock import read_lock
from hal_ops import Op, Request, feature, required
from hal_ops.attention import AttentionRequest

ARCHS = [
    *(("nvidia", f"sm_{n}") for n in (80, 86, 89, 90, 100, 103, 120, 999)),
    *(("rocm", f"gfx{n}") for n in ("90a", "942", "950", "1100", "1999")),
    *(("musa", f"mp_{n}") for n in (22, 31, 99)),
]
INSTALLED = {entry.name for entry in importlib.metadata.entry_points(group="hal.platforms")}


def simulated(platform: str, arch: str) -> Any:
    missing = pytest.mark.skipif(platform not in INSTALLED, reason=f"the plugin of {platform} is not installed")
    return pytest.param(f"{platform}:{arch}", id=arch, marks=missing)


@pytest.fixture
def attention(llama_options):
    """``hal explain attention`` for a Llama layer, with these further options."""
    return lambda *more: ("explain", "attention", *llama_options, *more)


@pytest.fixture
def fastlib(fake_platform, library):
    """A platform whose one library needs f20 and a package that is not installed, and knows no sinks."""
    needs = hal.Needs("fastlib", ">=2.0", install="`pip install fastlib`")
    kernels = library("fast", needs=(needs,), platforms={"fake": hal.Archs(at_least="f20")}, runtime=">=12.3")
    return lambda arch="f20": fake_platform(kernels=kernels, archs=(arch,))


@pytest.mark.parametrize("device", [simulated(*pair) for pair in ARCHS])
@pytest.mark.parametrize(
    "more", [[], ["--window", "128", "--sinks"], ["--softcap", "30", "--page-size", "16", "--dtype", "float16"]]
)
def test_every_arch_gets_a_full_answer(hal_cli, attention, device: str, more: list[str]) -> None:
    # requirement X16, X19, R2
    result = hal_cli(*attention(*more, "--device", device))
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert device in text.splitlines()[0]
    assert "(simulated)" in text.splitlines()[0]
    for phase in ("prefill", "extend", "decode"):
        assert any(line.startswith(phase) and "chosen" in line for line in text.splitlines())
    assert "unknown" not in text.replace("the version here is unknown (", "")


@pytest.mark.parametrize("device", [simulated(*pair) for pair in ARCHS])
def test_every_candidate_has_a_verdict(hal_json, attention, device: str) -> None:
    # requirement X19, E6
    facts = hal_json(*attention("--device", device))
    assert {"op", "device", "request", "complete", "joint", "phases", "near_misses", "precedence", "notes"} <= set(
        facts
    )
    assert facts["device"]["simulated"] is True
    for phase, choice in facts["phases"].items():
        names = {c["kernel"] for c in choice["candidates"]}
        assert names == {k.name for k in hal._plugins.registry().candidates("attention", phase)}
        for candidate in choice["candidates"]:
            assert (candidate["status"] == "refused") == bool(candidate["reasons"])
            assert all(reason["code"] and reason["text"] for reason in candidate["reasons"])


def test_simulated_facts_reach_the_decision(hal_json, attention, fastlib) -> None:
    fastlib()
    old = hal_json(*attention("--device", "fake:f20,frt=12.2", "--library", "fastlib==2.1"))
    new = hal_json(*attention("--device", "fake:f20,frt=12.10", "--library", "fastlib==2.1"))
    assert old["phases"]["decode"]["kernel"] != "fast.decode"
    assert new["phases"]["decode"]["kernel"] == "fast.decode"
    assert new["device"]["runtime"] == "12.10"


@pytest.mark.parametrize(
    ("arch", "libraries", "codes"),
    [
        ("f20", [], {"not_installed"}),
        ("f10", ["--library", "fastlib==2.1"], {"arch_too_low"}),
        ("f10", [], {"arch_too_low", "not_installed"}),
        ("f20", ["--library", "fastlib==1.9"], {"version_too_old"}),
    ],
)
def test_the_package_is_blamed_for_the_package_and_the_hardware_for_the_hardware(
    hal_json, hal_cli, attention, fastlib, arch: str, libraries: list[str], codes: set[str]
) -> None:
    # requirement E6, E7, P45
    fastlib(arch)
    facts = hal_json(*attention(*libraries))
    fast = next(c for c in facts["phases"]["decode"]["candidates"] if c["kernel"] == "fast.decode")
    assert {reason["code"] for reason in fast["reasons"]} == codes
    text = hal_cli(*attention(*libraries)).stdout
    other_arch = "arch_too_low" in codes
    assert ("for other archs only: fast.decode (f20 or newer)" in text) == other_arch
    assert ("fastlib is not installed" in text) == ("not_installed" in codes and not other_arch)


def test_libraries_given_replace_the_installed_ones_but_torch_and_triton(hal_json, attention, fastlib) -> None:
    fastlib()
    facts = hal_json("doctor", "--library", "fastlib==2.1")
    found = {lib["library"]: list(lib["installed"].values()) for lib in facts["libraries"]}
    assert found["fastlib"] == ["2.1"]
    assert found["torch"] == [importlib.metadata.version("torch")]
    assert {name for name, versions in found.items() if versions} <= {"fastlib", "torch", "triton"}
    replaced = hal_json("doctor", "--library", "torch==2.6", "--library", "fastlib==2.1")
    assert next(lib for lib in replaced["libraries"] if lib["library"] == "torch")["installed"] == {"torch": "2.6"}


def test_a_library_needs_a_version(hal_cli, attention) -> None:
    result = hal_cli(*attention("--library", "torch"))
    assert result.exit_code == 2
    assert "write name==version" in result.stderr


def test_a_forced_kernel_that_cannot_run_is_refused_with_everything(hal_cli, hal_json, attention, fastlib) -> None:
    # requirement R1, P28, P26, B1
    fastlib()
    args = attention("--sinks", "--kernel", "fast")
    result = hal_cli(*args)
    assert result.exit_code == 1
    text = result.stdout
    for part in (
        "argument kernel='fast'",
        "32/8 heads",
        "fake:f20",
        "sinks: fast.decode does not declare it",
        "fastlib is not installed",
        "next step:",
        "reference.decode",
    ):
        assert part in text
    facts = hal_json(*args, code=1)
    assert facts["complete"] is False
    assert facts["phases"]["decode"]["kernel"] is None
    assert facts["phases"]["decode"]["forced_by"] == "argument kernel='fast'"


def test_a_kernel_can_be_forced_for_one_phase(hal_json, attention) -> None:
    phases = hal_json(*attention("--kernel", "decode=reference"))["phases"]
    assert phases["decode"]["kernel"] == "reference.decode"
    assert phases["decode"]["forced_by"]
    assert phases["prefill"]["forced_by"] is None


@pytest.mark.parametrize("name", ["referense", "decode=referense", "decod=reference"])
def test_a_misspelt_forced_kernel_is_a_usage_error(hal_cli, attention, name: str) -> None:
    # requirement X3
    result = hal_cli(*attention("--kernel", name))
    assert result.exit_code == 2
    assert "reference" in result.stderr
    assert "decode" in result.stderr


@pytest.mark.parametrize("name", ["decode=reference", "reference.decode"])
def test_forcing_a_phase_that_is_not_asked_for_is_a_usage_error(hal_cli, attention, name: str) -> None:
    # requirement B1, P26
    result = hal_cli(*attention("--phases", "prefill", "--kernel", name))
    assert result.exit_code == 2
    assert "the request has only prefill" in result.stderr


def test_the_argument_beats_the_variable_and_the_order_is_printed(hal_cli, hal_json, attention, monkeypatch) -> None:
    # requirement X2, P28
    monkeypatch.setenv("HAL_ATTENTION", "reference")
    assert hal_json(*attention())["phases"]["decode"]["forced_by"] == "variable HAL_ATTENTION"
    facts = hal_json(*attention("--kernel", "reference"))
    assert facts["phases"]["decode"]["forced_by"] == "argument kernel='reference'"
    assert " > ".join(hal.PRECEDENCE) in hal_cli(*attention()).stdout
    monkeypatch.setenv("HAL_ATTENTION", "referense")
    result = hal_cli(*attention())
    assert result.exit_code == 1
    assert "HAL_ATTENTION" in result.stderr
    assert "'reference'" in result.stderr


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--window", "128"], "window", [127, 0]),
        (["--window", "127,0"], "window", [127, 0]),
        (["--window", "127,none", "--no-causal"], "window", [127, None]),
        (["--window", "none"], "window", [None, 0]),
        (["--softcap", "30"], "softcap", 30.0),
        (["--sinks"], "sinks", True),
        (["--no-causal"], "causal", False),
        (["--page-size", "64"], "page_size", 64),
        (["--page-size", "auto"], "page_size", 16),
        (["--kv-dtype", "fp8", "--device", "cpu:x86_64"], "kv_dtype", "float8_e4m3fn"),
        (["--dtype", "fp16"], "dtype", "float16"),
        (["--phases", "prefill,decode"], "phases", ["prefill", "decode"]),
        (["--phases", "prefill"], "phases", ["prefill"]),
        (["--softmax-scale", "0.5"], "softmax_scale", 0.5),
    ],
)
def test_request_options(hal_json, attention, options: list[str], field: str, value: Any) -> None:
    found = hal_json(*attention(*options))["request"][field]
    assert found == value or (field == "window" and found[0] == value[0])


def test_every_field_of_the_request_is_an_option(hal_cli) -> None:
    text = hal_cli("explain", "attention", "--help").stdout
    for field in dataclasses.fields(AttentionRequest):
        assert "--" + field.name.replace("_", "-") in text
    assert "one learned logit a query head" in text
    assert text.count("[required]") == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--softcap", "-1"], "softcap=-1.0"),
        (["--window", "0"], "window=0"),
        (["--dtype", "bloat16"], "did you mean 'bfloat16'"),
        (["--kv-layout", "NDH"], "choose 'NHD', 'HND', 'HDN' or 'auto'"),
        (["--phases", "decod"], "prefill, extend, decode"),
        (["--page-size", "sixteen"], "page_size='sixteen'"),
        (["--device", "cpu:x86_64,meory=1GiB"], "'memory'"),
        (["--device", "cpu:x86_64,memory=lots"], "KiB, MiB, GiB or TiB"),
    ],
)
def test_wrong_values_are_usage_errors(hal_cli, attention, options: list[str], said: str) -> None:
    # requirement X3, C11, E8
    result = hal_cli(*attention(*options))
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_missing_required_option_is_named(hal_cli) -> None:
    result = hal_cli("explain", "attention", "--num-q-heads", "8")
    assert result.exit_code == 2
    assert "--num-kv-heads" in result.stderr


def test_options_may_stand_before_the_op(hal_cli, llama_options) -> None:
    result = hal_cli("explain", *llama_options, "attention")
    assert result.exit_code == 0
    assert "32/8 heads" in result.stdout


def test_what_only_the_device_can_refuse_is_a_no(hal_cli, hal_json, attention, fake_platform) -> None:
    fake_platform(capabilities=lambda self, arch: frozenset({"bf16"}))
    result = hal_cli(*attention("--kv-dtype", "fp8"))
    assert result.exit_code == 1
    assert "fake:0" in result.stdout
    assert "name the format exactly" in result.stdout
    facts = hal_json(*attention("--kv-dtype", "fp8"), code=1)
    assert not facts["complete"]
    assert "name the format exactly" in facts["notes"][0]


def test_a_bare_arch_is_told_how_to_simulate(hal_cli, attention, fake_platform) -> None:
    fake_platform()
    result = hal_cli(*attention("--device", "f30"))
    assert result.exit_code == 1
    assert "--device fake:f30" in result.stderr


def test_lock_collects_decisions(hal_cli, attention, tmp_path: Path) -> None:
    file = tmp_path / "hal.lock"
    assert f"HAL_LOCK={file}" in hal_cli(*attention("--lock", str(file))).stdout
    hal_cli(*attention("--window", "128", "--lock", str(file)))
    hal_cli(*attention("--window", "128", "--lock", str(file)))
    assert sorted(r["op"] for r in read_lock(file)) == ["attention", "attention", "kv_cache_write"]


def test_a_decision_that_takes_the_place_of_another_in_a_lock_says_so(hal_cli, attention, tmp_path: Path) -> None:
    file = tmp_path / "hal.lock"
    first = hal_cli(*attention("--device", "cpu", "--phases", "prefill", "--lock", str(file)))
    assert "replaced" not in first.output
    again = hal_cli(*attention("--device", "cpu", "--phases", "prefill", "--kernel", "reference", "--lock", str(file)))
    replaced = (
        f"replaced  a decision about attention that was in {file}: prefill: torch_cpu.prefill -> reference.prefill"
    )
    assert replaced in again.stdout
    (row,) = read_lock(file)
    assert row["kernels"]["prefill"]["kernel"] == "reference.prefill"


def test_nothing_is_locked_where_nothing_was_decided(hal_cli, attention, fastlib, tmp_path: Path) -> None:
    fastlib()
    file = tmp_path / "hal.lock"
    assert hal_cli(*attention("--kernel", "fast", "--lock", str(file))).exit_code == 1
    assert not file.exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvRequest(Request):
    """What a plugin's op needs.

    Fields:
        channels: how many. kernel: taps of the filter.
        shape, device: of the input; and a field with the name of an option of the command itself.
    """

    op: ClassVar[str] = "conv"
    channels: int = required()
    kernel: int = required(default=3)
    shape: tuple[int, ...] = feature((1,))
    device: str | None = feature(None)
    exact: bool = feature(False, default=True)


def test_options_of_a_plugins_op(hal_json, hal_cli, fake_platform) -> None:
    op = Op(name="conv", summary="a toy", request=ConvRequest)
    fields = {"channels": hal.Anything(), "kernel": hal.Anything(), "shape": hal.Anything(), "exact": hal.Anything()}
    kernel = hal.Kernel(
        name="toy.conv", op="conv", phase="call", target="nowhere:call", priority=hal.Band.PLUGIN, fields=fields
    )
    fake_platform(kernels=(kernel,), ops=lambda self: (op,))
    given = ("--channels", "8", "--request-kernel", "5", "--shape", "4", "--no-exact", "--kernel", "toy")
    facts = hal_json("explain", "conv", *given)
    assert facts["request"] == {"channels": 8, "kernel": 5, "shape": [4], "device": None, "exact": False}
    assert facts["phases"]["call"]["forced_by"] == "argument kernel='toy'"
    refused = hal_json("explain", "conv", "--channels", "8", "--request-device", "16", code=1)
    assert refused["request"]["device"] == "16"
    text = hal_cli("explain", "conv", "--help").stdout
    assert "--request-kernel" in text
    assert "taps of the filter" in text
    assert "conv" in hal_cli("explain", "--help").stdout
