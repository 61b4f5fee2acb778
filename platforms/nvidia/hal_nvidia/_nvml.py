"""NVML through ``pynvml`` (distribution ``nvidia-ml-py``; written against 13.615). Creates no CUDA context.

NVML counts every GPU in PCI order, whatever ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER`` say.
"""

from __future__ import annotations

from typing import Any

from hal_nvidia._cards import Card, Reading
from hal_nvidia._products import CORES_PER_MULTIPROCESSOR
from hal_nvidia._system import SourceError

__all__ = ["read_nvml"]

_DRIVER_HINT = "install the NVIDIA driver, or start the container with the NVIDIA runtime (`--gpus all`)"


def read_nvml(nvml: Any) -> Reading:
    """Every GPU that NVML lists.

    Raises:
        SourceError: NVML does not start, or lists nothing.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise SourceError(f"NVML does not start: {error}", _DRIVER_HINT) from error
    try:
        return _Reader(nvml).read()
    finally:
        nvml.nvmlShutdown()


class _Reader:
    """Asks NVML, and remembers what it would not tell."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.untold: dict[str, str] = {}

    def read(self) -> Reading:
        count = self.ask("nvmlDeviceGetCount")
        if not count:
            why = self.untold.get("nvmlDeviceGetCount", "it lists no GPU")
            raise SourceError(f"NVML started, but {why}", _DRIVER_HINT)
        cards = tuple(self.card(index) for index in range(count))
        driver, cuda = self.ask("nvmlSystemGetDriverVersion"), self.ask("nvmlSystemGetCudaDriverVersion_v2")
        return Reading(
            source="NVML",
            cards=cards,
            driver=_text(driver),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            untold=tuple(f"{call}: {why}" for call, why in self.untold.items()),
        )

    def ask(self, call: str, *arguments: Any, rare: bool = False) -> Any:
        """The answer, or None where it is not to be had. ``rare`` answers are not missed: most devices have none."""
        function = getattr(self.nvml, call, None)
        try:
            if function is not None:
                return function(*arguments)
            why = "this pynvml lacks it"
        except self.nvml.NVMLError as error:
            why = str(error)
        if not rare:
            self.untold[call] = why
        return None

    def card(self, index: int) -> Card:
        handle = self.ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            why = self.untold["nvmlDeviceGetHandleByIndex"]
            return Card(position=index, problem=f"NVML cannot open GPU {index}: {why}")
        uuid, capability = _text(self.ask("nvmlDeviceGetUUID", handle)), self.capability(handle)
        mig = self.ask("nvmlDeviceGetMigMode", handle, rare=True) if capability and capability >= (8, 0) else None
        enabled = bool(mig and mig[0])
        name = _text(self.ask("nvmlDeviceGetName", handle))
        return Card(
            position=index,
            uuid=uuid,
            pci=_pci(self.ask("nvmlDeviceGetPciInfo", handle)),
            name=name,
            capability=capability,
            memory=self.memory(handle),
            multiprocessors=self.multiprocessors(handle, capability),
            mig_enabled=enabled,
            instances=self.instances(handle, uuid, name, capability) if enabled else (),
        )

    def capability(self, handle: Any) -> tuple[int, int] | None:
        found = self.ask("nvmlDeviceGetCudaComputeCapability", handle)
        return None if found is None else (int(found[0]), int(found[1]))

    def memory(self, handle: Any) -> int | None:
        """Bytes, what the driver keeps for itself included: on an H200 CUDA counts 0.4 % less."""
        info = self.ask("nvmlDeviceGetMemoryInfo", handle)
        return None if info is None else int(info.total)

    def multiprocessors(self, handle: Any, capability: tuple[int, int] | None) -> int | None:
        """NVML counts multiprocessors of MIG instances only; for whole GPUs it counts float32 cores."""
        per = CORES_PER_MULTIPROCESSOR.get(capability) if capability else None
        cores = self.ask("nvmlDeviceGetNumGpuCores", handle) if per else None
        return cores // per if cores and per and cores % per == 0 else None

    def instances(self, parent: Any, uuid: str, name: str, capability: tuple[int, int] | None) -> tuple[Card, ...]:
        most = self.ask("nvmlDeviceGetMaxMigDeviceCount", parent) or 0
        found = []
        for index in range(most):
            handle = self.ask("nvmlDeviceGetMigDeviceHandleByIndex", parent, index, rare=True)
            if handle is not None:
                found.append(self.instance(handle, index, uuid, name, capability))
        return tuple(found)

    def instance(self, handle: Any, index: int, parent: str, name: str, capability: tuple[int, int] | None) -> Card:
        attributes = self.ask("nvmlDeviceGetAttributes", handle)
        ids = self.ask("nvmlDeviceGetGpuInstanceId", handle), self.ask("nvmlDeviceGetComputeInstanceId", handle)
        return Card(
            position=index,
            uuid=_text(self.ask("nvmlDeviceGetUUID", handle)),
            name=_text(self.ask("nvmlDeviceGetName", handle)) or f"{name} MIG",
            capability=capability,
            memory=self.memory(handle),
            multiprocessors=int(attributes.multiprocessorCount) if attributes is not None else None,
            instance=None if None in ids else (int(ids[0]), int(ids[1])),
            parent=parent,
        )


def _text(value: Any) -> str:
    """Older bindings return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _pci(info: Any) -> str:
    """``00000000:18:00.0`` becomes ``0000:18:00.0``, as Linux writes it."""
    domain, _, rest = _text(getattr(info, "busId", "")).lower().partition(":")
    return f"{domain[-4:]}:{rest}" if rest else ""
