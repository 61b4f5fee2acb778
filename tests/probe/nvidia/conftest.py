"""Machines with NVIDIA GPUs: an NVML that answers from records, and driver answers as the child process writes them."""

# ruff: noqa: N802 - names are pynvml's

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._device import Probe
from hal_nvidia import NvidiaPlatform
from hal_nvidia._system import SourceError, System

GIB = 1 << 30
CUDA_TORCH = {"torch": "2.11.0+cu130", "cuda": "13.0"}


class NVMLError(Exception):
    """As pynvml's, with its text."""


class NotSupportedError(NVMLError):
    def __str__(self) -> str:
        return "Not Supported"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU as NVML would state it. ``silent`` lists calls that answer "Not Supported"."""

    name: str
    capability: tuple[int, int]
    memory: int
    cores: int
    uuid: str
    bus: str
    mig: tuple[Gpu, ...] | None = None
    instance: tuple[int, int] = (0, 0)
    units: int = 0
    silent: frozenset[str] = frozenset()
    lost: bool = False


class FakeNvml:
    """The part of pynvml 13.615 that the probe may call; anything else is an AttributeError."""

    NVMLError = NVMLError

    @classmethod
    def calls(cls) -> set[str]:
        """Names of every call it answers."""
        return {name for name in (*vars(cls), *_ANSWERS) if name.startswith("nvml")}

    def __init__(
        self, gpus: tuple[Gpu, ...], *, fails: str = "", driver: Any = "580.159.04", cuda: int = 13000
    ) -> None:
        self.gpus, self.fails, self.driver, self.cuda = gpus, fails, driver, cuda
        self.started = self.stopped = 0

    def nvmlInit(self) -> None:
        if self.fails:
            raise NVMLError(self.fails)
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.stopped += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> Any:
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if self.gpus[index].lost:
            raise NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        if index >= len(gpu.mig or ()):
            raise NVMLError("Not Found")
        return (gpu.mig or ())[index]

    def __getattr__(self, call: str) -> Callable[[Gpu], Any]:
        answer = _ANSWERS.get(call)
        if answer is None:
            raise AttributeError(call)

        def ask(gpu: Gpu) -> Any:
            if call in gpu.silent:
                raise NotSupportedError
            return answer(gpu)

        return ask


def _mig_mode(gpu: Gpu) -> list[int]:
    if gpu.capability not in ((8, 0), (9, 0), (10, 0)):
        raise NotSupportedError
    return [int(gpu.mig is not None)] * 2


_ANSWERS: dict[str, Callable[[Gpu], Any]] = {
    "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
    "nvmlDeviceGetName": lambda gpu: gpu.name,
    "nvmlDeviceGetPciInfo": lambda gpu: SimpleNamespace(busId=f"0000{gpu.bus}".upper()),
    "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu.capability,
    "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=gpu.memory),
    "nvmlDeviceGetNumGpuCores": lambda gpu: gpu.cores,
    "nvmlDeviceGetMigMode": _mig_mode,
    "nvmlDeviceGetMaxMigDeviceCount": lambda gpu: 7,
    "nvmlDeviceGetAttributes": lambda gpu: SimpleNamespace(multiprocessorCount=gpu.units),
    "nvmlDeviceGetGpuInstanceId": lambda gpu: gpu.instance[0],
    "nvmlDeviceGetComputeInstanceId": lambda gpu: gpu.instance[1],
}

H200_UUIDS = (
    "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    "GPU-8932f937-11aa-4106-c12f-20bd9faed9f7",
    "GPU-1d0e5f2a-0001-4106-c12f-20bd9faed9f8",
    "GPU-1d0e5f2a-0002-4106-c12f-20bd9faed9f9",
    "GPU-a0000000-0001-4106-c12f-20bd9faed9fa",
    "GPU-b0000000-0001-4106-c12f-20bd9faed9fb",
    "GPU-c0000000-0001-4106-c12f-20bd9faed9fc",
    "GPU-d0000000-0001-4106-c12f-20bd9faed9fd",
)
H200S = tuple(
    Gpu("NVIDIA H200", (9, 0), 143771 << 20, 132 * 128, uuid, f"0000:{bus}:00.0")
    for uuid, bus in zip(H200_UUIDS, ("18", "2a", "3a", "5d", "9a", "ab", "ba", "db"), strict=True)
)
T4 = Gpu("Tesla T4", (7, 5), 15 * GIB, 40 * 64, "GPU-74747474-0000-4106-c12f-20bd9faed9f6", "0000:01:00.0")
H100 = Gpu("NVIDIA H100 PCIe", (9, 0), 80 * GIB, 114 * 128, "GPU-90909090-0000-4106-c12f-20bd9faed9f6", "0000:41:00.0")


def slice_of(number: int, gib: int, units: int, uuid: str) -> Gpu:
    """One MIG instance of an A100."""
    name = f"NVIDIA A100-SXM4-80GB MIG {units // 14}g.{gib}gb"
    return Gpu(name, (8, 0), gib * GIB, 0, uuid, "", instance=(number, 0), units=units)


A100 = Gpu(
    "NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 108 * 64, "GPU-a1000000-0000-4106-c12f-20bd9faed9f6", "0000:07:00.0"
)
MIG_A100 = dataclasses.replace(
    A100,
    mig=(
        slice_of(2, 20, 28, "MIG-11111111-aaaa-5c7f-9a1e-000000000001"),
        slice_of(7, 10, 14, "MIG-22222222-aaaa-5c7f-9a1e-000000000002"),
        slice_of(8, 10, 14, "MIG-22222222-bbbb-5c7f-9a1e-000000000003"),
    ),
)


def row(gpu: Gpu, units: int, *, integrated: int = 0) -> dict[str, Any]:
    """What the child process writes about a GPU."""
    domain, bus, rest = gpu.bus.split(":") if gpu.bus else ("0", "0", "0.0")
    return {
        "name": gpu.name,
        "uuid": gpu.uuid.partition("-")[2],
        "memory": gpu.memory,
        "multiprocessors": units,
        "integrated": integrated,
        "domain": int(domain, 16),
        "bus": int(bus, 16),
        "device": int(rest.partition(".")[0], 16),
        "major": gpu.capability[0],
        "minor": gpu.capability[1],
    }


class Machine(System):
    """A machine given by keyword. What is not given is missing, and says so."""

    def __init__(
        self,
        root: Path,
        *,
        nvml: FakeNvml | None = None,
        driver: list[dict[str, Any]] | str | None = None,
        torch: Any = None,
        build: Mapping[str, str] = CUDA_TORCH,
        tegra: bool = False,
    ) -> None:
        super().__init__(root)
        self._nvml, self._driver, self._torch, self._build, self._tegra = nvml, driver, torch, build, tegra
        self.asked: list[Mapping[str, str]] = []

    def nvml(self) -> Any:
        if self._nvml is None:
            raise SourceError("pynvml cannot be imported", "pip install nvidia-ml-py")
        return self._nvml

    def ask_driver(self, environ: Mapping[str, str]) -> str:
        self.asked.append(environ)
        if self._driver is None:
            raise SourceError("not asked: there is no driver here")
        return self._driver if isinstance(self._driver, str) else json.dumps({"cuda": 13000, "devices": self._driver})

    def torch(self) -> Any:
        return self._torch

    def torch_build(self) -> Mapping[str, str]:
        return self._build

    def driver_version(self) -> str:
        return "580.159.04" if self._driver is not None else ""

    def is_tegra(self) -> bool:
        return self._tegra


@pytest.fixture
def records() -> SimpleNamespace:
    """GPUs to build machines from, and the makers."""
    return SimpleNamespace(
        H200S=H200S,
        T4=T4,
        H100=H100,
        A100=A100,
        MIG_A100=MIG_A100,
        Gpu=Gpu,
        Nvml=FakeNvml,
        Machine=Machine,
        row=row,
        replace=dataclasses.replace,
    )


@pytest.fixture
def probe(tmp_path: Path) -> Callable[..., Probe]:
    """Probe a machine with some GPUs in NVML, an environment, and what :class:`Machine` takes."""

    def ask(gpus: tuple[Gpu, ...] | None, environ: Mapping[str, str] | None = None, **facts: Any) -> Probe:
        nvml = None if gpus is None else FakeNvml(gpus)
        return NvidiaPlatform(Machine(tmp_path, **{"nvml": nvml, **facts})).probe(environ or {})

    return ask


@pytest.fixture
def cuda_torch() -> Callable[..., Any]:
    """A torch whose ``torch.cuda`` knows one H200."""

    def make(*, initialised: bool = True, home: str = "torch.cuda", **version: str | None) -> Any:
        def is_initialized() -> bool:
            return initialised

        def get_device_properties(index: int) -> SimpleNamespace:
            return SimpleNamespace(
                name="NVIDIA H200",
                major=9,
                minor=0,
                total_memory=150_121_545_728,
                multi_processor_count=132,
                uuid=H200_UUIDS[0].removeprefix("GPU-"),
                pci_domain_id=0,
                pci_bus_id=24,
                pci_device_id=0,
                is_integrated=0,
            )

        def lazy_init() -> None:
            raise AssertionError("a probe must not start CUDA")

        for function in (is_initialized, get_device_properties, lazy_init):
            function.__module__ = home
        cuda = SimpleNamespace(
            is_initialized=is_initialized,
            get_device_properties=get_device_properties,
            device_count=lambda: 1,
            _lazy_init=lazy_init,
        )
        return SimpleNamespace(version=SimpleNamespace(**{"cuda": "13.0", "hip": None, **version}), cuda=cuda)

    return make
