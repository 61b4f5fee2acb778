"""Devices: which is the default, what names one, and what is said when there is none."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

import hal
from hal.errors import DeviceError, VisibilityError


def test_the_cpu_is_always_there() -> None:  # requirement P17
    assert hal.device("cpu").platform == "cpu"
    assert hal.devices("cpu")[0].torch_device() == torch.device("cpu")


def test_an_accelerator_comes_before_the_cpu(fake_platform: Any) -> None:  # requirement P1
    fake_platform()
    assert hal.device().id == "fake:0"
    assert [d.platform for d in hal.devices()] == ["fake", "cpu"]


def test_rank_decides_between_accelerators(fake_platform: Any) -> None:  # requirement P1, P2
    fake_platform("fakea", rank=40)
    fake_platform("fakeb", rank=60)
    assert hal.device().platform == "fakeb"


def test_a_tie_names_the_variable_that_breaks_it(
    fake_platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement R13
    fake_platform("fakea")
    fake_platform("fakeb")
    with pytest.raises(DeviceError, match="HAL_PLATFORM=fakea"):
        hal.device()
    monkeypatch.setenv("HAL_PLATFORM", "fakeb")
    assert hal.device().platform == "fakeb"


def test_a_platform_without_devices_is_never_the_default(fake_platform: Any) -> None:  # requirement P6
    fake_platform(devices=0)
    assert hal.device().platform == "cpu"


def test_an_unusable_accelerator_is_passed_over_with_a_warning(
    fake_platform: Any, caplog: pytest.LogCaptureFixture
) -> None:  # requirement P6, R5
    fake_platform()
    broken = dataclasses.replace(hal.device(), unusable="torch is built without it")
    hal.reset()
    with hal.simulate([broken, hal.device("cpu")]), caplog.at_level(logging.WARNING, "hal"):
        assert hal.device().platform == "cpu"
        hal.device()
    assert [r.message for r in caplog.records] == [
        f"{broken} cannot be used (torch is built without it); the default device is {hal.device('cpu')}"
    ]


def test_asking_for_a_platform_without_devices_lists_every_probe(
    fake_platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P9, P7
    fake_platform(devices=0)
    monkeypatch.setenv("HAL_PLATFORM", "fake")
    with pytest.raises(DeviceError) as caught:
        hal.device()
    assert "variable HAL_PLATFORM asks for platform 'fake'" in str(caught.value)
    assert "fake: fake bus: 0 devices" in str(caught.value)


@pytest.mark.parametrize("which", ["fake:1", 1, "FAKE:1 "])
def test_a_device_can_be_named(fake_platform: Any, which: Any) -> None:
    fake_platform(devices=2)
    assert hal.device(which).index == 1


def test_tensors_and_torch_devices_name_their_device() -> None:  # requirement X7
    assert hal.device(torch.zeros(1)).platform == "cpu"
    assert hal.device(torch.device("cpu")).platform == "cpu"
    assert hal.device(hal.device("cpu")) is hal.device("cpu") or hal.device(hal.device("cpu")) == hal.device("cpu")


@pytest.mark.parametrize(
    ("which", "text"),
    [("fakee", "Did you mean 'fake'"), ("fake:7", "visible are fake:0"), ("fake:x", "names no device")],
)
def test_a_wrong_name_is_an_error(fake_platform: Any, which: str, text: str) -> None:
    fake_platform()
    with pytest.raises(DeviceError, match=text):
        hal.device(which)


@pytest.mark.parametrize("which", ["nvidia", "cuda", "h100"])
def test_what_is_not_here_can_be_simulated(which: str) -> None:  # requirement X19
    """A torch device type that a platform knows is no misspelling of another."""
    if torch.cuda.is_available():
        pytest.skip("there is such a device here")
    with pytest.raises(DeviceError, match="write its platform and arch, such as nvidia:sm_90") as caught:
        hal.device(which)
    assert "Did you mean" not in str(caught.value)


def test_probes_are_kept_by_their_visibility_variables(
    fake_platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P12
    calls: list[str | None] = []

    def probe(self: Any, environ: Any) -> hal.Probe:
        calls.append(environ.get("FAKE_VISIBLE_DEVICES"))
        return hal.Probe()

    fake_platform(probe=probe, visibility=("FAKE_VISIBLE_DEVICES",))
    for value in ("0", "0", "1", "0"):
        monkeypatch.setenv("FAKE_VISIBLE_DEVICES", value)
        hal.devices("fake")
    assert calls == ["0", "1"]


def test_a_probe_that_raises_hides_no_other_vendor(
    fake_platform: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P3, P6
    def probe(self: Any, environ: Any) -> hal.Probe:
        raise OSError("bus fell off")

    fake_platform(probe=probe)
    with caplog.at_level(logging.WARNING, "hal"):
        assert hal.device().platform == "cpu"
    assert "bus fell off" in caplog.text
    assert "probe failed: OSError: bus fell off" in str(hal.probe_report()["fake"].evidence[0])
    hal.reset()
    monkeypatch.setenv("HAL_PLATFORM", "fake")
    with pytest.raises(DeviceError, match="bus fell off"):
        hal.device()


def test_contradicting_visibility_is_one_clear_error(fake_platform: Any) -> None:  # requirement P19
    def probe(self: Any, environ: Any) -> hal.Probe:
        raise VisibilityError("A=0 and B=1 disagree", variables={"A": "0", "B": "1"})

    fake_platform(probe=probe)
    with pytest.raises(VisibilityError, match="A=0 and B=1"):
        hal.devices()
