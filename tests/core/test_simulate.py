"""Simulated devices and libraries: the grammar, and where its errors point."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal import _libraries
from hal.errors import DeviceError, SimulationError


def test_a_device_with_every_key(fake_platform: Any) -> None:  # requirement E14
    fake_platform(devices=0)
    text = "fake:f20, frt=12.8, driver=570.86, memory=80GiB, name=Big One, multiprocessors=132, uuid=GPU-1 * 2"
    with hal.simulate(text):
        first, second = hal.devices()
    assert (first.index, second.index) == (0, 1)
    assert first.arch.name == "f20"
    assert first.runtime == hal.Version.parse("12.8")
    assert first.driver == hal.Version.parse("570.86")
    assert first.memory == 80 * 2**30
    assert first.name == "Big One"
    assert first.multiprocessors == 132
    assert first.simulated
    assert second.id == "fake:1"


def test_devices_of_several_platforms_and_archs(fake_platform: Any) -> None:  # requirement X7, P15
    fake_platform("fakea", devices=0)
    fake_platform("fakeb", devices=0, rank=60)
    with hal.simulate("fakea:f10; fakea:f20*2 ; fakeb:f1,capabilities=a+b"):
        assert [d.id for d in hal.devices("fakea")] == ["fakea:0", "fakea:1", "fakea:2"]
        assert [d.arch.name for d in hal.devices("fakea")] == ["f10", "f20", "f20"]
        assert hal.device("fakeb").capabilities == {"a", "b"}
        assert hal.device("fakea:2").index == 2


def test_the_variable_does_the_same(fake_platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_platform(devices=0)
    monkeypatch.setenv("HAL_DEVICES", "fake:f30*3")
    assert len(hal.devices()) == 3
    with hal.simulate("fake:f10"):
        assert len(hal.devices()) == 1
    assert len(hal.devices()) == 3


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("fkae:f10", 0, "Did you mean 'fake'"),
        ("fake", 4, "comes ':' and an arch"),
        ("fake:", 5, "comes ':' and an arch"),
        ("fake:x10", 5, "no arch of platform"),
        ("fake:f10,drivr=1", 9, "Did you mean 'driver'"),
        ("fake:f10,driver", 15, "needs a value"),
        ("fake:f10,driver=abc", 16, "no version"),
        ("fake:f10,memory=80Gx", 16, "no amount of memory"),
        ("fake:f10,multiprocessors=many", 25, "no whole number"),
        ("fake:f10;fake:f20,cuda=1", 18, "unknown key 'cuda'"),
        ("fake:f10*0", 9, "give 1 to 4096"),
        ("fake:f10*99999", 9, "give 1 to 4096"),
        ("fake:f10,frt=12.8*2 fake:f20", 17, "after '12.8' may come"),
        ("fake:f10,frt=12.8 fake:f20", 17, "after '12.8' may come"),
        ("fake:f10,frt=12.8,frt=12.9", 18, "'frt' is given a second time"),
        ("fake:f10,runtime=12.8, FRT = 12.9", 23, "'FRT' is given a second time, after 'runtime'"),
        ("fake:f10,frt=", 13, "'frt' needs a value: frt="),
        ("fake:f10,frtt=1", 9, "unknown key 'frtt'. Did you mean 'frt'. Known: frt, runtime"),
        ("fake:f10,memory=80", 16, "a number with its unit"),
        ("fake:f10,memory=0GiB", 16, "a number with its unit"),
        ("fake:f10,multiprocessors=0", 25, "no whole number from 1"),
        ("fake:f10,capabilities=a++b", 22, "join names by"),
    ],
)
def test_errors_point_at_the_character(fake_platform: Any, text: str, position: int, message: str) -> None:
    fake_platform(devices=0)
    with hal.simulate(text), pytest.raises(SimulationError, match=message) as caught:
        hal.devices()
    assert caught.value.position == position
    lines = str(caught.value).splitlines()
    assert lines[-2] == f"  {text}"
    assert lines[-1].index("^") == position + 2


def test_libraries_replace_what_is_installed() -> None:
    assert _libraries.installed("pytest") is not None
    with hal.simulate(libraries={"Flash_Attn.3": "3.0.0"}):
        assert _libraries.installed("flash-attn-3") == hal.Version.parse("3.0.0")
        assert _libraries.installed("pytest") is None
        with hal.simulate(libraries={}):
            assert _libraries.installed("flash-attn-3") is None
        assert _libraries.installed("flash-attn-3") is not None
    assert _libraries.installed("pytest") is not None


def test_a_library_that_no_kernel_looks_for_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"'flsh-attn'\. Did you mean 'flash-attn'"):  # noqa: SIM117
        with hal.simulate(libraries={"torch": "2.11.0", "flsh-attn": "2.8.3"}):
            pass


def test_the_outer_state_holds_again_after_an_exception(fake_platform: Any) -> None:  # requirement C8
    fake_platform(devices=0)
    with hal.simulate("fake:f10"):
        with pytest.raises(RuntimeError), hal.simulate("fake:f20", libraries={}):
            raise RuntimeError
        assert hal.device().arch.name == "f10"


def test_nothing_runs_on_a_simulated_accelerator(fake_platform: Any, library: Any, llama: dict[str, Any]) -> None:
    class Accelerator:
        torch_type = "cuda"

    fake_platform(devices=0, kernels=library("fast"), torch_type=Accelerator.torch_type)
    with hal.simulate("fake:f10"):
        request = hal.get_attention.__globals__["AttentionRequest"](**llama)
        assert hal.select(request).kernels()["decode"] == "fast.decode"
        with pytest.raises(DeviceError, match=r"simulated: hal\.select"):
            hal.get_attention(**llama)
