"""Devices out of what a source said: visibility first, then each card's facts and why it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping

from hal import Device, Evidence, Version
from hal_nvidia._arch import UNKNOWN, from_number
from hal_nvidia._capabilities import capabilities
from hal_nvidia._cards import Card, Reading
from hal_nvidia._order import visible_cards
from hal_nvidia._system import System
from hal_nvidia._torch import OTHERS

__all__ = ["devices"]


def devices(
    reading: Reading, environ: Mapping[str, str], system: System, build: Mapping[str, str]
) -> tuple[tuple[Device, ...], list[Evidence]]:
    """The visible devices in CUDA's order, and what is to be said about them.

    Raises:
        VisibilityError: a shortened UUID in ``CUDA_VISIBLE_DEVICES`` fits several GPUs.
    """
    cards, notes = visible_cards(reading, environ, system)
    unusable = _unusable(build, reading)
    if cards and unusable:
        notes = [*notes, Evidence("torch build", unusable)]
    return tuple(_device(card, index, reading, build, unusable) for index, card in enumerate(cards)), [*notes]


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
        other = [f"for {name} {build[key]}, not for CUDA" for key, name in OTHERS.items() if build.get(key)]
        return f"{torch} is built {(other or ['without CUDA'])[0]}: install a CUDA build of torch"
    built, driver = Version.parse(build["cuda"]), Version.parse(reading.cuda)
    if built.known and driver.known and built.release[0] > driver.release[0]:
        wanted = f"a driver for CUDA {built.release[0]}, or a build of torch for CUDA {driver.release[0]}"
        return f"{torch} is built for CUDA {built}, but the driver ends at CUDA {driver}: install {wanted}"
    return ""
