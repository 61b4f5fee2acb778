"""Moore Threads devices whose tensors live on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import emulated.mate
import pytest
import torch

import hal
from hal_musa import MusaPlatform


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> Callable[..., hal.Device]:
    """A device of an arch, real as far as HAL is concerned, on which torch computes with the CPU."""

    def make(arch: str = "mp_31", musa: str = "4.3.6") -> hal.Device:
        platform = MusaPlatform()
        bare = hal.Device(platform="musa", arch=platform.parse_arch(arch), runtime=hal.Version.parse(musa))
        return dataclasses.replace(platform.simulate(bare), torch_type="cpu", simulated=False)

    return make


@pytest.fixture(autouse=True)
def current_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """``torch.cpu.device`` stands in for ``torch.musa.device``; gives what tells the current device."""
    monkeypatch.setattr(torch.cpu, "device", emulated.mate.on_device, raising=False)
    return emulated.mate.current_device
