"""Which platform's device is the default: by rank, deterministic, and an error where nothing decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal.errors import DeviceError
from hal_ops.attention import AttentionRequest

Install = Callable[..., str]

NOTHING = "def probe(self, environ): return hal.Probe((), (hal.Evidence('acme bus', {text!r}, remedy='{remedy}'),))"
UNUSABLE = """
def probe(self, environ):
    device = hal.Device(platform=self.name, arch=self.parse_arch("x1"), unusable="torch is not built for it")
    return hal.Probe((device,), (hal.Evidence("acme bus", "one device", 1),))
"""


def test_an_accelerator_comes_before_the_cpu(install: Install) -> None:
    # requirement P1
    install("acme")
    assert hal.device().id == "acme:0"
    assert [d.platform for d in hal.devices()] == ["acme", "cpu"]


def test_the_higher_rank_is_the_default_whatever_the_names(install: Install) -> None:
    # requirement P1
    install("alpha", members="rank = 40")
    install("zeta", members="rank = 60")
    assert hal.device().id == "zeta:0"
    assert [d.platform for d in hal.devices()] == ["zeta", "alpha", "cpu"]


def test_two_platforms_of_one_rank_are_an_error_that_names_the_variable(install: Install) -> None:
    # requirement R13
    install("zeta")
    install("alpha")
    with pytest.raises(DeviceError) as caught:
        hal.device()
    assert "alpha and zeta" in str(caught.value)
    assert "HAL_PLATFORM=alpha" in str(caught.value)
    assert "device=" in str(caught.value)
    assert [d.platform for d in hal.devices()] == ["alpha", "zeta", "cpu"]


@pytest.mark.parametrize("name", ["alpha", "zeta", "host"])
def test_the_variable_decides(install: Install, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # requirement R13, P1
    install("zeta")
    install("alpha")
    install("host", members="rank = 1")
    monkeypatch.setenv("HAL_PLATFORM", name)
    assert hal.device().platform == name
    assert hal.device(0).id == f"{name}:0"


def test_naming_the_device_decides_over_the_variable(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("zeta")
    install("alpha")
    monkeypatch.setenv("HAL_PLATFORM", "alpha")
    assert hal.device("zeta:0").platform == "zeta"


def test_a_platform_without_devices_is_never_selected(install: Install) -> None:
    # requirement P6
    install("acme", members="rank = 99\n" + NOTHING.format(text="no card answers", remedy="load the driver"))
    install("host", members="rank = 1")
    assert hal.device().platform == "host"
    assert hal.devices("acme") == ()


def test_a_platform_whose_devices_cannot_be_used_is_passed_over_aloud(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    # requirement P6, R5
    install("acme", members=UNUSABLE)
    install("host", members="rank = 1")
    assert hal.device().platform == "host"
    hal.device()
    warned = [r.getMessage() for r in caplog.records if "acme:0" in r.getMessage()]
    assert len(warned) == 1
    assert "torch is not built for it" in warned[0]


def test_asking_for_a_platform_without_devices_says_what_its_probe_saw(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement P6, P7
    install("acme", members=NOTHING.format(text="no card answers", remedy="load the driver"))
    monkeypatch.setenv("HAL_PLATFORM", "acme")
    with pytest.raises(DeviceError, match="variable HAL_PLATFORM asks for platform 'acme'") as caught:
        hal.device()
    assert "acme bus: no card answers; load the driver" in str(caught.value)


def test_without_any_device_the_error_lists_every_probe(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P9, P3
    from hal import _cpu

    nothing = hal.Probe((), (hal.Evidence("cpuinfo", "tells nothing"),))
    monkeypatch.setattr(_cpu.CpuPlatform, "probe", lambda self, environ: nothing)
    install("acme", members=NOTHING.format(text="no card answers", remedy="load the driver"))
    install("burnt", members=UNUSABLE)
    install("broken", head="raise OSError('libbroken.so is missing')")
    install("raising", members="def probe(self, environ): raise OSError('no bus')")
    with pytest.raises(DeviceError) as caught:
        hal.device()
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "acme: acme bus: no card answers; load the driver" in lines
    assert "cpu: cpuinfo: tells nothing" in lines
    assert "plugin broken (broken-hal 1.2) failed: OSError: libbroken.so is missing" in lines
    assert any(line.startswith("raising: raising: probe failed: OSError: no bus") for line in lines)
    assert any(line.startswith("burnt:0") and "torch is not built for it" in line for line in lines)
    assert set(caught.value.evidence) == {"acme", "burnt", "cpu", "portable", "raising"}


def test_probes_are_asked_once_for_each_visibility(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        "acme",
        head="calls = []",
        members="""
            visibility = ("ACME_VISIBLE",)
            def probe(self, environ):
                calls.append(environ.get("ACME_VISIBLE"))
                count = int(environ.get("ACME_VISIBLE", "2"))
                arch = self.parse_arch("x1")
                devices = tuple(hal.Device(platform="acme", arch=arch, index=i) for i in range(count))
                return hal.Probe(devices, (hal.Evidence("bus", f"{count} devices", count),))
        """,
    )
    assert [len(hal.devices("acme")) for _ in range(3)] == [2, 2, 2]
    monkeypatch.setenv("ACME_VISIBLE", "1")
    assert [len(hal.devices("acme")) for _ in range(2)] == [1, 1]
    platform: Any = hal.probe_report()
    assert platform["acme"].evidence[0].found == 1


def test_a_device_that_cannot_be_used_refuses_every_kernel_with_the_reason(install: Install) -> None:
    # requirement P6
    install("acme", members=UNUSABLE)
    request = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64, phases=("prefill",))
    choice = hal.select(request, device="acme:0").choices["prefill"]
    assert choice.kernel is None
    for candidate in choice.candidates:
        assert ("runtime_missing", "torch is not built for it") in [(r.code, r.text) for r in candidate.reasons]
