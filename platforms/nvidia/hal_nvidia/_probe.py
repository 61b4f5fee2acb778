"""The probe: sources in order, then visibility, then devices with the evidence for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hal import Device, Evidence, Probe, Version
from hal_nvidia._arch import UNKNOWN, from_number
from hal_nvidia._capabilities import capabilities
from hal_nvidia._cards import Card, Reading, SourceError, plural
from hal_nvidia._driver import read_driver
from hal_nvidia._nvml import read_nvml
from hal_nvidia._order import visible_cards
from hal_nvidia._system import System
from hal_nvidia._torch import read_torch

__all__ = ["probe"]

_OTHERS = {"hip": "ROCm", "musa": "MUSA"}


def probe(environ: Mapping[str, str], system: System) -> Probe:
    """NVIDIA devices that a process with this environment sees, in CUDA's order.

    Raises:
        VisibilityError: a shortened UUID in ``CUDA_VISIBLE_DEVICES`` fits several GPUs.
    """
    evidence: list[Evidence] = []
    build = system.torch_build()
    reading = _first_reading(environ, system, build, evidence)
    if reading is None:
        return Probe((), tuple(evidence))
    cards, notes = visible_cards(reading, environ, system)
    evidence += notes
    unusable = _unusable(build, reading)
    if cards and unusable:
        evidence.append(Evidence("torch build", unusable))
    devices = tuple(_device(card, index, reading, build, unusable) for index, card in enumerate(cards))
    return Probe(devices, tuple(evidence))


def _first_reading(
    environ: Mapping[str, str], system: System, build: Mapping[str, str], evidence: list[Evidence]
) -> Reading | None:
    for name, read in _sources(environ, system, build):
        try:
            reading = read()
        except SourceError as missing:
            evidence.append(Evidence(name, str(missing), remedy=missing.remedy))
            continue
        evidence.append(Evidence(name, _summary(reading), found=len(reading.cards)))
        return reading
    if system.is_tegra():
        remedy = "check that /dev/nvgpu and /dev/nvmap are there and may be opened"
        evidence.append(Evidence("Tegra", "this is a Jetson, but its GPU does not answer", remedy=remedy))
    return None


def _summary(reading: Reading) -> str:
    versions = f"driver {reading.driver or 'unknown'}, CUDA {reading.cuda or 'unknown'}"
    text = f"{plural(len(reading.cards), 'GPU')}, {versions}"
    return f"{text}; does not tell {'; '.join(reading.untold)}" if reading.untold else text


def _sources(
    environ: Mapping[str, str], system: System, build: Mapping[str, str]
) -> tuple[tuple[str, Callable[[], Reading]], ...]:
    def driver() -> Reading:
        if any(build.get(key) for key in _OTHERS):
            vendor = next(name for key, name in _OTHERS.items() if build.get(key))
            raise SourceError(f"not asked: torch is built for {vendor}, whose machines may carry their own libcuda")
        return read_driver(system.ask_driver(environ), system.driver_version())

    return (
        ("NVML", lambda: read_nvml(system.nvml())),
        ("CUDA driver", driver),
        ("torch", lambda: read_torch(system.torch())),
    )


def _device(card: Card, index: int, reading: Reading, build: Mapping[str, str], unusable: str) -> Device:
    arch = from_number(*card.capability) if card.capability else UNKNOWN
    problem = card.problem or ("" if card.capability else "its compute capability could not be learnt")
    return Device(
        platform="nvidia",
        arch=arch,
        index=index,
        name=card.name,
        memory=card.memory,
        multiprocessors=card.multiprocessors,
        runtime=_runtime(build, reading),
        driver=_driver(reading),
        uuid=card.uuid,
        pci=card.pci,
        capabilities=capabilities(arch),
        torch_type="cuda",
        unusable=problem or unusable,
        properties=_properties(card, reading),
    )


def _properties(card: Card, reading: Reading) -> tuple[tuple[str, object], ...]:
    from_nvml = reading.source == "NVML"
    facts: dict[str, object] = {"source": reading.source, "cuda_driver": reading.cuda, "p2p_known": from_nvml}
    if card.integrated is not None:
        facts["integrated"] = card.integrated
    if card.instance is not None:
        facts["mig_parent"], facts["mig_instance"] = card.parent, f"{card.instance[0]}/{card.instance[1]}"
    return tuple(facts.items())


def _runtime(build: Mapping[str, str], reading: Reading) -> Version:
    if build.get("cuda"):
        return Version.parse(build["cuda"])
    if reading.cuda:
        return Version.parse(reading.cuda)
    return Version.unknown("torch is not built for CUDA, and the driver does not tell its version")


def _driver(reading: Reading) -> Version:
    if reading.driver:
        return Version.parse(reading.driver)
    return Version.unknown(f"{reading.source} does not tell it")


def _unusable(build: Mapping[str, str], reading: Reading) -> str:
    """Why nothing can run on any of the devices, or an empty text."""
    if not build:
        return "torch is not installed: install a CUDA build of torch"
    torch = f"torch {build.get('torch', '')}".strip()
    if not build.get("cuda"):
        other = [f"for {name} {build[key]}, not for CUDA" for key, name in _OTHERS.items() if build.get(key)]
        return f"{torch} is built {(other or ['without CUDA'])[0]}: install a CUDA build of torch"
    built, driver = Version.parse(build["cuda"]), Version.parse(reading.cuda)
    if built.known and driver.known and built.release[0] > driver.release[0]:
        wanted = f"a driver for CUDA {built.release[0]}, or a build of torch for CUDA {driver.release[0]}"
        return f"{torch} is built for CUDA {built}, but the driver ends at CUDA {driver}: install {wanted}"
    return ""
