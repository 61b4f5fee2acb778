"""Machines with Moore Threads GPUs: an MTML that answers from records, and a torch_musa."""

# ruff: noqa: N802 - names are pymtml's

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._device import Probe
from hal_musa import MusaPlatform
from hal_musa._system import SourceError, System

GIB = 1 << 30
MUSA_TORCH = {"torch": "2.7.1"}


class MTMLError(Exception):
    """As pymtml's, with its text."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU as MTML would state it. ``silent`` lists calls that answer "Not Supported"."""

    name: str
    memory: int
    uuid: str
    sbdf: str
    silent: frozenset[str] = frozenset()


class FakeMtml:
    """The part of pymtml 2.4.3 that the probe may call; anything else is an AttributeError.

    After a shutdown it refuses to start again, as its library does.
    """

    MTMLError = MTMLError

    def __init__(self, gpus: tuple[Gpu, ...], *, fails: Exception | None = None, driver: str = "3.3.1-server") -> None:
        self.gpus, self.fails, self._driver = gpus, fails, driver
        self._mtmlLib_refcount = 0
        self.open_memory = 0

    def mtmlLibraryInit(self) -> None:
        if self.fails:
            raise self.fails
        self._mtmlLib_refcount += 1

    def mtmlLibraryCountDevice(self) -> int:
        if not self._mtmlLib_refcount:
            raise MTMLError("Uninitialized")
        return len(self.gpus)

    def mtmlLibraryInitDeviceByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def mtmlLibraryInitSystem(self) -> str:
        return "system"

    def mtmlSystemGetDriverVersion(self, system: str) -> str:
        return self._driver

    def mtmlDeviceGetName(self, gpu: Gpu) -> str:
        return self._told(gpu, "mtmlDeviceGetName", gpu.name)

    def mtmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return self._told(gpu, "mtmlDeviceGetUUID", gpu.uuid)

    def mtmlDeviceGetPciInfo(self, gpu: Gpu) -> Any:
        return SimpleNamespace(sbdf=gpu.sbdf.encode())

    def mtmlDeviceInitMemory(self, gpu: Gpu) -> Gpu:
        self.open_memory += 1
        return gpu

    def mtmlMemoryGetTotal(self, memory: Gpu) -> int:
        return self._told(memory, "mtmlMemoryGetTotal", memory.memory)

    def mtmlDeviceFreeMemory(self, memory: Gpu) -> None:
        self.open_memory -= 1

    def _told(self, gpu: Gpu, call: str, value: Any) -> Any:
        if call in gpu.silent:
            raise MTMLError("Not Supported")
        return value


S5000_UUIDS = (
    "7de4d75b-7522-1fdc-8dc4-db9a169a5e88",
    "a7257b94-d3d7-61b5-4f15-bbf8c2f23218",
    "a7257b94-eb86-52b5-e1a8-2bad0823b10c",
    "4d1254b9-65e5-6b8a-6904-0e144d5f5819",
)
S5000S = tuple(
    Gpu("MTT S5000", 80 * GIB, uuid, f"00000000:{bus:02x}:00.0") for bus, uuid in enumerate(S5000_UUIDS, start=0x2A)
)
S4000 = Gpu("MTT S4000", 48 * GIB, "2b7d56ad-43c9-89d9-703c-03c503e7fad4", "00000000:01:00.0")
S80 = Gpu("MTT S80", 16 * GIB, "3c7d56ad-43c9-89d9-703c-03c503e7fad4", "00000000:02:00.0")


class Machine(System):
    """A machine given by keyword. What is not given is missing, and says so."""

    def __init__(
        self,
        root: Path,
        *,
        mtml: FakeMtml | None = None,
        torch: Any = None,
        build: Mapping[str, str] = MUSA_TORCH,
        torch_musa: str = "2.7.1",
    ) -> None:
        super().__init__(root)
        self._mtml, self._torch, self._build, self._torch_musa = mtml, torch, build, torch_musa

    def mtml(self) -> Any:
        if self._mtml is None:
            raise SourceError("pymtml cannot be imported", "pip install torch-hal-musa[mtml]")
        return self._mtml

    def torch(self) -> Any:
        return self._torch

    def torch_build(self) -> Mapping[str, str]:
        return self._build

    def torch_musa_version(self) -> str:
        return self._torch_musa


class Forbidden:
    """A ``torch.cuda`` that nobody may touch."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"torch.cuda.{name} was asked for")


@pytest.fixture
def records() -> SimpleNamespace:
    """GPUs to build machines from, and the makers."""
    return SimpleNamespace(
        S5000S=S5000S, S4000=S4000, S80=S80, Mtml=FakeMtml, Gpu=Gpu, Machine=Machine, replace=dataclasses.replace
    )


@pytest.fixture
def probe(tmp_path: Path) -> Callable[..., Probe]:
    """Probe a machine with some GPUs in MTML, an environment, and what :class:`Machine` takes."""

    def ask(gpus: tuple[Gpu, ...] | None, environ: Mapping[str, str] | None = None, **facts: Any) -> Probe:
        mtml = None if gpus is None else FakeMtml(gpus)
        return MusaPlatform(Machine(tmp_path, **{"mtml": mtml, **facts})).probe(environ or {})

    return ask


@pytest.fixture
def musa_torch() -> Callable[..., Any]:
    """A torch with torch_musa imported; ``torch.cuda`` is forbidden."""

    def make(*names: str, initialised: bool = True, version: str = "4030") -> Any:
        capability = {"MTT S5000": (3, 1), "MTT S4000": (2, 2), "MTT S80": (2, 1), "MTT X900": (4, 1)}

        def properties(index: int) -> SimpleNamespace:
            major, minor = capability[names[index]]
            return SimpleNamespace(
                name=names[index], major=major, minor=minor, total_memory=79 * GIB, multi_processor_count=56
            )

        musa = SimpleNamespace(
            is_initialized=lambda: initialised, device_count=lambda: len(names), get_device_properties=properties
        )
        return SimpleNamespace(version=SimpleNamespace(musa=version, cuda=None), musa=musa, cuda=Forbidden())

    return make
