"""``hal doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hal
from hal._ledger import Ledger, Row, identity
from hal.cli import _smoke
from hal.cli._models import MODELS, requests_for
from hal_ops.attention import AttentionRequest

SECTIONS = {
    "versions",
    "plugins",
    "devices",
    "evidence",
    "default_device",
    "libraries",
    "errata",
    "ledger",
    "decisions",
    "advice",
    "problems",
}


@pytest.fixture
def fast(fake_platform, library):
    """A platform whose best library is missing, and would serve everything but softcap."""
    free = {"window": hal.Windows(), "sinks": hal.OneOf(False, True), "softmax_scale": hal.Anything()}
    needs = hal.Needs("fastlib", ">=2.0", install="`pip install fastlib`")
    erratum = hal.Erratum(
        id="fastlib-1",
        kernels=("fast.*",),
        summary="wrong for long rows",
        url="https://example.org/1",
        library="fastlib",
        versions="<2.2",
        when={"max_q_len": hal.Range(4)},
    )
    fake_platform(kernels=library("fast", needs=(needs,), fields=free), errata=lambda self: (erratum,))


def test_every_section_in_text_and_json(hal_cli, hal_json) -> None:
    facts = hal_json("doctor")
    assert set(facts) == SECTIONS
    assert {"torch-hal", "python", "torch", "torch_build", "triton"} <= set(facts["versions"])
    assert set(facts["versions"]["torch_build"]) <= {"cuda", "hip", "musa"}
    assert facts["problems"] == []
    text = hal_cli("doctor").stdout
    for title in (
        "versions",
        "plugins",
        "devices",
        "libraries",
        "errata",
        "verified",
        "what well-known",
        "what to install",
        "problems",
    ):
        assert any(line.startswith(title) for line in text.splitlines())
    assert "unknown" not in text


def test_every_model_is_decided_for_every_cache_format(hal_json) -> None:
    rows = hal_json("doctor")["decisions"]
    assert {row["model"] for row in rows} == {model.name for model in MODELS}
    assert {row["cache"] for row in rows if row["model"] == "Llama-3-8B"} == {"bfloat16", "float8_e4m3fn"}
    served = {"MiniLM-L6": {"prefill"}, "DeepSeek-V3": {"extend", "decode"}, "DeepSeek-V3 prompts": {"prefill"}}
    for row in rows:
        assert set(row["kernels"]) == served.get(row["model"], {"prefill", "extend", "decode"})
        assert all(row["kernels"].values())


def test_layers_that_share_a_cache_get_one_page_size_and_layout(hal_json, fake_platform, attention_kernel) -> None:
    windowed = {"sinks": hal.OneOf(True), "window": hal.Windows()}
    kernels = [
        attention_kernel(f"tiles.{phase}", fields={**windowed, "page_size": hal.OneOf(128)})
        for phase in ("extend", "decode")
    ]
    fake_platform(kernels=kernels)
    rows = [
        row for row in hal_json("doctor")["decisions"] if row["model"] == "GPT-OSS-120B" and row["cache"] == "bfloat16"
    ]
    assert {row["layers"] for row in rows} == {"sliding", "full"}
    assert {(row["page_size"], row["kv_layout"]) for row in rows} == {(128, "NHD")}


def test_what_to_install_comes_from_near_misses(hal_cli, hal_json, fast) -> None:
    facts = hal_json("doctor")
    [advice] = facts["advice"]
    assert advice["install"] == "`pip install fastlib`"
    assert advice["kernels"] == ["fast.prefill", "fast.extend", "fast.decode"]
    assert "Llama-3-8B" in advice["models"]
    assert "Gemma-2-9B" not in advice["models"]  # it needs a softcap, which an installation does not bring
    assert "`pip install fastlib`: fast.prefill|extend|decode would be first" in hal_cli("doctor").stdout
    satisfied = hal_json("doctor", "--library", "fastlib==2.5")
    assert satisfied["advice"] == []
    assert {r["kernels"]["decode"] for r in satisfied["decisions"] if r["model"] == "Mistral-7B-v0.1"} >= {
        "fast.decode"
    }


def test_a_library_that_would_not_be_first_is_not_advised(hal_json, fake_platform, library) -> None:
    chosen = hal._plugins.registry().kernels["torch_cpu.prefill"]
    needs = hal.Needs("peerlib", install="`pip install peerlib`")
    places = {"cpu": hal.Archs()}
    fake_platform(kernels=library("peer", needs=(needs,), priority=chosen.priority, platforms=places), devices=0)
    facts = hal_json("doctor", "--device", "cpu")
    assert any(
        near["install"] == ["`pip install peerlib`"] for row in facts["decisions"] for near in row["near_misses"]
    )
    assert facts["advice"] == []


def test_libraries_say_why_they_are_not_usable(hal_cli, hal_json, fast) -> None:
    # requirement E6, P45
    def fastlib(*args: str) -> dict[str, Any]:
        return next(lib for lib in hal_json("doctor", *args)["libraries"] if lib["library"] == "fastlib")

    kernels = ["fast.prefill", "fast.extend", "fast.decode"]
    missing = fastlib()
    assert (missing["installed"], missing["kernels"], missing["usable"]) == ({}, kernels, [])
    assert missing["reasons"] == [{"text": "fastlib is not installed; `pip install fastlib`", "kernels": kernels}]
    old = fastlib("--library", "fastlib==1.0")
    assert old["installed"] == {"fastlib": "1.0"}
    assert "needs fastlib >=2.0; 1.0 is installed" in old["reasons"][0]["text"]
    assert fastlib("--library", "fastlib==2.5")["usable"] == kernels
    elsewhere = fastlib("--device", "cpu:x86_64")
    assert elsewhere["reasons"] == [{"text": "for fake only; this is cpu", "kernels": kernels}]
    row = next(line for line in hal_cli("doctor").stdout.splitlines() if line.strip().startswith("fastlib"))
    assert "not installed" in row


def test_errata_in_force(hal_cli, hal_json, fast) -> None:
    # requirement D13
    assert "fastlib-1" not in [e["id"] for e in hal_json("doctor")["errata"]]
    rows = hal_json("doctor", "--library", "fastlib==2.1")["errata"]
    [row] = [e for e in rows if e["id"] == "fastlib-1"]
    assert row["url"] == "https://example.org/1"
    assert row["when"] == {"max_q_len": "at least 4"}
    line = next(
        s for s in hal_cli("doctor", "--library", "fastlib==2.1").stdout.splitlines() if "wrong for long rows" in s
    )
    assert "max_q_len at least 4" in line
    for elsewhere in (["--library", "fastlib==2.5"], ["--library", "fastlib==2.1", "--device", "cpu:x86_64"]):
        assert "fastlib-1" not in [e["id"] for e in hal_json("doctor", *elsewhere)["errata"]]


def test_the_ledger_is_counted_for_this_device_and_these_versions(hal_cli, hal_json) -> None:
    settings = hal._settings.current()
    ledger = Ledger(settings.cache_dir() / "ledger.json")
    kernel = hal._plugins.registry().kernels["reference.decode"]
    key = identity(kernel, hal.device("cpu"))
    corner = AttentionRequest(num_q_heads=2, num_kv_heads=1, head_dim=64).corner("decode")
    rows = [
        Row(kernel.name, key, corner, "verified", date="2026-01-02"),
        Row(kernel.name, key, {**corner, "head_dim": 80}, "failed", "off by 3.0", "2026-01-03"),
        Row(kernel.name, {**key, "torch": "0.1"}, corner, "verified", date="2025-01-02"),
    ]
    ledger.record(rows)
    found = hal_json("doctor", "--device", "cpu")["ledger"]
    assert found["kernels"] == {"reference.decode": {"verified": 1, "failed": 1}}
    assert found["elsewhere"] == 1
    assert found["failures"][0]["detail"] == "off by 3.0"
    text = hal_cli("doctor", "--device", "cpu").stdout
    assert "reference.decode failed on 2026-01-03: off by 3.0" in text
    assert hal_json("doctor", "--device", "cpu:x86_64")["ledger"]["kernels"] == {}


def test_a_damaged_ledger_is_a_problem_and_the_rest_is_answered(hal_cli, hal_json) -> None:
    path = hal._settings.current().cache_dir() / "ledger.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    facts = hal_json("doctor", code=1)
    assert any("ledger" in problem and "`hal verify`" in problem for problem in facts["problems"])
    assert facts["devices"]
    assert "ledger" in hal_cli("doctor").stdout.partition("\nproblems\n")[2]


def test_a_broken_plugin_is_shown_with_its_distribution(hal_cli, hal_json, fake_platform) -> None:
    # requirement R11, X9, P3
    def libraries(self: Any) -> Any:
        raise RuntimeError("half of it is missing")

    fake_platform(name="worse", devices=0, libraries=libraries)
    facts = hal_json("doctor", code=1)
    [record] = [p for p in facts["plugins"] if p["name"] == "worse"]
    assert (record["status"], record["distribution"]) == ("failed", "worse-plugin")
    assert "half of it is missing" in record["error"]
    result = hal_cli("doctor")
    assert result.exit_code == 1
    assert "worse-plugin" in result.stdout.partition("\nproblems\n")[2]


def test_denied_plugins_are_shown(hal_json, fake_platform, monkeypatch) -> None:
    # requirement P5
    fake_platform()
    monkeypatch.setenv("HAL_PLUGINS", "-fake")
    assert {p["name"]: p["status"] for p in hal_json("doctor")["plugins"]}["fake"] == "denied"


def test_an_unusable_device_is_a_problem(hal_json, fake_platform) -> None:
    bad = hal.Device(platform="fake", arch=hal.Arch("fake", "f1", "f", (1,)), unusable="torch is built without it")
    fake_platform(probe=lambda self, environ: hal.Probe((bad,)))
    facts = hal_json("doctor", code=1)
    assert any("torch is built without it" in problem for problem in facts["problems"])
    assert facts["default_device"] == "cpu:0"
    assert facts["decisions"]


def test_an_asked_for_platform_without_devices_still_gets_a_report(hal_cli, fake_platform, monkeypatch) -> None:
    fake_platform(devices=0)
    monkeypatch.setenv("HAL_PLATFORM", "fake")
    result = hal_cli("doctor")
    assert result.exit_code == 1
    assert "fake bus" in result.stdout
    assert "HAL_PLATFORM" in result.stdout.partition("\nproblems\n")[2]


def test_run_makes_the_chosen_kernels_in_their_own_processes(hal_json, hal_cli, monkeypatch) -> None:
    # requirement P46
    seen: list[str] = []

    def try_kernels(wanted: dict[str, Any], device: str, say: Any) -> list[dict[str, str]]:
        seen.extend(wanted)
        return [
            {"kernel": name, "error": "its process died of SIGSEGV" if name.endswith("decode") else ""}
            for name in wanted
        ]

    monkeypatch.setattr(_smoke, "try_kernels", try_kernels)
    facts = hal_json("doctor", "--run", code=1)
    chosen = {kernel for row in facts["decisions"] for kernel in row["kernels"].values()}
    assert set(seen) == chosen
    assert any("died of SIGSEGV" in problem for problem in facts["problems"])
    assert hal_cli("doctor", "--run", "--device", "cpu:x86_64").exit_code == 2


def test_a_kernel_that_kills_its_process_is_named(monkeypatch) -> None:
    # requirement P46
    cases = {
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
        "raise ImportError('undefined symbol: x')": "undefined symbol: x",
        "import sys; sys.exit(3)": "exited with 3",
        "": "",
    }
    for code, said in cases.items():
        monkeypatch.setattr(_smoke, "_CODE", code)
        [row] = _smoke.try_kernels({"some.kernel": {}}, "cpu:0", lambda text: None)
        assert said in row["error"]
        assert bool(said) == bool(row["error"])


def test_a_kernel_is_really_made(hal_json) -> None:
    request = AttentionRequest(num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=16, kv_layout="NHD", window=(3, 0))
    say: list[str] = []
    assert _smoke.try_kernels({"reference.decode": request.as_dict()}, "cpu:0", say.append) == [
        {"kernel": "reference.decode", "error": ""}
    ]
    assert say == ["reference.decode"]


def test_models_make_valid_requests_with_a_source() -> None:
    device = hal.device("cpu")
    for model in MODELS:
        assert model.source
        for requests in requests_for(model, device).values():
            assert all(type(request) is model.request for request in requests.values())
    [gemma] = [m for m in MODELS if m.name == "Gemma-2-9B"]
    sliding = requests_for(gemma, device)["bfloat16"]["sliding"]
    assert (sliding.window, sliding.softcap, sliding.head_dim) == ((4095, 0), 50.0, 256)


def test_dtype_and_fp8_follow_the_device(fake_platform) -> None:
    # requirement P29
    old = hal.Device(platform="fake", arch=hal.Arch("fake", "f1"), capabilities=frozenset({"fp16"}))
    assert set(requests_for(MODELS[0], old)) == {"float16"}
    new = hal.Device(platform="fake", arch=hal.Arch("fake", "f1"), capabilities=frozenset({"bf16", "fp8_e4m3fnuz"}))
    assert set(requests_for(MODELS[0], new)) == {"bfloat16", "fp8"}


def test_python_in_the_report_is_this_one(hal_json) -> None:
    assert hal_json("doctor")["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_nothing_is_written(hal_cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HAL_CACHE_DIR", str(tmp_path / "cache"))
    hal_cli("doctor")
    assert not (tmp_path / "cache").exists()
