"""HAL's conformance tests on this plugin, and what is Acme's own. Run ``pytest`` here, with the plugin installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import hal
import hal.testing
from hal_acme import AcmePlatform
from hal_ops.attention import AttentionRequest

LAYER = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64, phases=("prefill",))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with two of our devices, and a cache of its own."""
    file = tmp_path / "devices.json"
    rows = [
        {"arch": "acme2+mx", "name": "Acme Two", "memory_gib": 32, "acmert": "2.1"},
        {"arch": "acme1", "acmert": "2.0"},
    ]
    file.write_text(json.dumps(rows))
    monkeypatch.setenv("ACME_DEVICES_FILE", str(file))
    monkeypatch.setenv("HAL_CACHE_DIR", str(tmp_path))
    hal.reset()
    yield file
    hal.reset()


class TestAcme(hal.testing.PluginConformance):
    """Everything that HAL asks of a plugin: declarations, imports, probe, archs, and every kernel's values."""

    platform = AcmePlatform


def test_the_probe_reads_the_file() -> None:
    two, one = hal.devices("acme")
    assert (two.id, two.name, two.arch.name, two.memory) == ("acme:0", "Acme Two", "acme2", 32 << 30)
    assert two.runtime == hal.Version.parse("2.1")
    assert "fp8_e4m3fn" in two.capabilities
    assert "tanh_unit" not in one.capabilities


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[1]", '[{"arch": "sm_90"}]', "[{}]"])
def test_without_devices_the_probe_says_what_it_looked_at(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    probe = AcmePlatform().probe({"ACME_DEVICES_FILE": str(file)})
    assert probe.devices == ()
    assert f"{file} tells no devices" in str(probe.evidence[0])


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [("acme1", "acme1", ()), (" ACME2+MX ", "acme2", ("mx",)), ("acme12+mx+sparse", "acme12", ("mx", "sparse"))],
)
def test_archs(text: str, name: str, features: tuple[str, ...]) -> None:
    arch = AcmePlatform().parse_arch(text)
    assert (arch.platform, arch.name, arch.features) == ("acme", name, features)


def test_our_kernel_is_chosen_for_our_devices() -> None:
    assert hal.select(LAYER, device="acme:0").kernels() == {"prefill": "acme.prefill"}
    assert hal.select(LAYER, device="cpu").kernels() != {"prefill": "acme.prefill"}


def test_what_the_kernel_does_not_do_is_refused_with_the_nearest_that_it_does() -> None:
    selection = hal.select(LAYER.replace(head_dim=60, v_head_dim=60, sinks=True), device="acme:0")
    refused = next(c for c in selection.choices["prefill"].candidates if c.kernel.name == "acme.prefill")
    assert {r.field for r in refused.reasons} == {"head_dim", "sinks"}
    assert {"head_dim": 64, "v_head_dim": 64, "sinks": False} in [dict(n.changes) for n in selection.near_misses()]


def test_the_erratum_is_obeyed() -> None:
    wide = LAYER.replace(head_dim=256, v_head_dim=256, softmax_scale=1 / 16)
    assert hal.select(wide, device="acme:0").kernels() == {"prefill": "acme.prefill"}
    text = hal.select(wide, device="acme:1").explain()
    assert "ACME-17" in text
    assert "https://acme.example/errata/17" in text


def test_an_arch_that_this_release_does_not_know_gets_the_reference_of_the_op() -> None:
    with hal.simulate("acme:acme9"):
        assert hal.get_op("logit_softcap", cap=30).selection.kernels() == {"call": "reference.logit_softcap"}


def test_a_runtime_that_is_too_old_is_refused() -> None:
    with hal.simulate("acme:acme2,acmert=1.9"):
        assert "needs acmert >=2.0; this is 1.9" in hal.select(LAYER).explain()
