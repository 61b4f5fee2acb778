"""Product names: from the card itself, from libdrm's list, from amdsmi, or from the table of data-center cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hal import Evidence
from hal_rocm._gpus import Gpu
from hal_rocm._products import NAMES
from hal_rocm._system import SourceError, System

__all__ = ["with_names"]

_LISTS = ("opt/amdgpu/share/libdrm/amdgpu.ids", "usr/share/libdrm/amdgpu.ids")


def with_names(
    gpus: Sequence[Gpu], environ: Mapping[str, str], system: System
) -> tuple[tuple[Gpu, ...], list[Evidence]]:
    """The GPUs with their product names, and evidence where a name could not be found."""
    listed = _listed(system)
    named = [dataclasses.replace(g, name=g.name or _stated(g, system) or _from_list(g, system, listed)) for g in gpus]
    named = [dataclasses.replace(g, name=g.name or NAMES.get(g.pci_device or 0, "")) for g in named]
    if all(g.name for g in named):
        return tuple(named), []
    try:
        market = _market_names(system.amdsmi(environ))
    except SourceError as missing:
        return tuple(named), [Evidence("amdsmi", f"{missing}, so some names are unknown", remedy=missing.remedy)]
    return tuple(dataclasses.replace(g, name=g.name or market.get(g.pci, "")) for g in named), []


def _stated(gpu: Gpu, system: System) -> str:
    return system.read(f"sys/class/drm/renderD{gpu.render}/device/product_name") if gpu.render else ""


def _listed(system: System) -> dict[tuple[int, int], str]:
    """(PCI device, revision) to name, from ``amdgpu.ids``: ``74A1,\\t00,\\tAMD Instinct MI300X``."""
    rows: dict[tuple[int, int], str] = {}
    text = next((text for text in map(system.read, _LISTS) if text), "")
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",", 2)]
        try:
            rows[int(parts[0], 16), int(parts[1], 16)] = parts[2]
        except (ValueError, IndexError):
            continue
    return rows


def _from_list(gpu: Gpu, system: System, listed: Mapping[tuple[int, int], str]) -> str:
    revision = system.read(f"sys/class/drm/renderD{gpu.render}/device/revision")
    if not revision or gpu.pci_device is None:
        return ""
    return listed.get((gpu.pci_device, int(revision, 16)), "")


def _market_names(amdsmi: Any) -> dict[str, str]:
    """PCI address to name, as amdsmi tells it."""
    names = {}
    for handle in amdsmi.amdsmi_get_processor_handles():
        try:
            place = str(amdsmi.amdsmi_get_gpu_device_bdf(handle)).lower()
            names[place] = str(amdsmi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        except amdsmi.AmdSmiException as error:
            raise SourceError(f"amdsmi does not tell names: {error}") from error
    return {place: name for place, name in names.items() if name != "N/A"}
