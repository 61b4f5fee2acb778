"""Devices: what a probe found, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from hal._arch import Arch
from hal._version import Version
from hal_ops import record

__all__ = ["Device", "Evidence", "Probe", "checked_probe"]


@record(frozen=True, kw_only=True)
class Device:
    """One accelerator (or the CPU). Frozen, hashable, and the same type for real and simulated hardware.

    Fields:
        platform: name of the platform that found it. arch: its generation. name: the vendor's product name.
        index: ordinal among the visible devices, as the runtime counts them.
        memory: bytes, or None if unknown. multiprocessors: SMs, CUs or cores, or None.
        runtime, driver: versions of the vendor's runtime (the one torch was built for, if torch is there) and driver.
        capabilities: names of what it can do; an open set (``bf16``, ``fp8_e4m3fn``, ``tma``, ``graph_capture``).
        torch_type: the type of ``torch.device`` that addresses it.
        unusable: why nothing can run on it, or an empty string.
        properties: further facts as (name, value) pairs.
    """

    platform: str
    arch: Arch
    index: int = 0
    name: str = ""
    memory: int | None = None
    multiprocessors: int | None = None
    runtime: Version = Version("", reason="not probed")
    driver: Version = Version("", reason="not probed")
    uuid: str = ""
    pci: str = ""
    capabilities: frozenset[str] = frozenset()
    torch_type: str = "cpu"
    unusable: str = ""
    simulated: bool = False
    properties: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """``platform:index``, the way to name the device to HAL."""
        return f"{self.platform}:{self.index}"

    def torch_device(self) -> Any:
        """The ``torch.device`` of this device."""
        import torch

        return torch.device(self.torch_type) if self.torch_type == "cpu" else torch.device(self.torch_type, self.index)

    def identity(self) -> dict[str, str]:
        """What measurements and ledger rows are keyed by. No ordinal: twins share their results."""
        return {
            "platform": self.platform,
            "arch": self.arch.name,
            "name": self.name,
            "multiprocessors": str(self.multiprocessors),
            "runtime": str(self.runtime),
            "driver": str(self.driver),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready facts."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts.update(
            id=self.id,
            arch=self.arch.name,
            runtime=str(self.runtime),
            driver=str(self.driver),
            capabilities=sorted(self.capabilities),
            properties=dict(self.properties),
        )
        return facts

    def __str__(self) -> str:
        label = "simulated " if self.simulated else ""
        return f"{label}{self.id} ({self.name or self.arch.name}, {self.arch.name})"


@record(frozen=True)
class Evidence:
    """What one source of a probe saw or missed. ``found`` counts devices; ``remedy`` is the next step, if any."""

    source: str
    text: str
    found: int = 0
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


@record(frozen=True)
class Probe:
    """A platform's answer: its devices, and the evidence for what it found or missed."""

    devices: tuple[Device, ...] = ()
    evidence: tuple[Evidence, ...] = ()


_KINDS: dict[str, tuple[type, ...]] = {
    "arch": (Arch,),
    "index": (int,),
    "name": (str,),
    "memory": (int, type(None)),
    "multiprocessors": (int, type(None)),
    "runtime": (Version,),
    "driver": (Version,),
    "uuid": (str,),
    "pci": (str,),
    "capabilities": (frozenset,),
    "torch_type": (str,),
    "unusable": (str,),
    "simulated": (bool,),
    "properties": (tuple,),
}


def checked_probe(answer: Any, platform: str) -> Probe:
    """What the probe of a platform answered, if the rest of HAL can rely on it.

    Raises:
        TypeError: saying what is no device, no evidence, or a device's field of another type.
    """
    if not isinstance(answer, Probe):
        raise TypeError(f"probe() gave {answer!r}, and not a hal.Probe")
    found = Probe(tuple(answer.devices), tuple(answer.evidence))
    for device in found.devices:
        if not isinstance(device, Device) or device.platform != platform:
            raise TypeError(f"probe() gave {device!r}, which is no hal.Device of platform {platform!r}")
        for field, kinds in _KINDS.items():
            value = getattr(device, field)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "None")
                raise TypeError(f"probe() gave a device with {field}={value!r}: give {wanted}")
        _check_contents(device)
    strange = next((e for e in found.evidence if not isinstance(e, Evidence)), None)
    if strange is not None:
        raise TypeError(f"probe() gave {strange!r} as evidence, which is no hal.Evidence")
    return found


def _check_contents(device: Device) -> None:
    if not isinstance(device.arch.name, str) or device.arch.platform != device.platform:
        raise TypeError(
            f"probe() gave a device of {device.platform!r} with {device.arch!r}, an arch of another platform"
        )
    if not all(isinstance(name, str) for name in device.capabilities):
        raise TypeError(f"probe() gave a device with capabilities={device.capabilities!r}: give a frozenset of names")
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in device.properties):
        raise TypeError(f"probe() gave a device with properties={device.properties!r}: give (name, value) pairs")
