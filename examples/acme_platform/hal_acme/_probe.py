"""Acme's probe: devices are described in a JSON file, which stands for the vendor's management library.

The file holds a list such as ``[{"arch": "acme2+mx", "name": "Acme Two", "memory_gib": 32, "acmert": "2.1"}]``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hal
from hal_acme._arch import capabilities, parse_arch

__all__ = ["VARIABLE", "complete", "probe"]

VARIABLE = "ACME_DEVICES_FILE"
_REMEDY = f"set {VARIABLE} to a file that describes the devices"
_MEMORY_GIB: dict[tuple[int, ...], int] = {(1,): 16, (2,): 32}


def probe(environ: Mapping[str, str]) -> hal.Probe:
    """Our devices, and the evidence for them. Missing hardware is an answer, not an error."""
    path = environ.get(VARIABLE, "").strip()
    if not path:
        return hal.Probe((), (hal.Evidence("device file", f"{VARIABLE} is not set", remedy=_REMEDY),))
    try:
        devices = tuple(_device(row, index) for index, row in enumerate(_rows(Path(path))))
    except (OSError, ValueError) as problem:
        return hal.Probe((), (hal.Evidence("device file", f"{path} tells no devices: {problem}", remedy=_REMEDY),))
    return hal.Probe(devices, (hal.Evidence("device file", path, found=len(devices)),))


def complete(device: hal.Device) -> hal.Device:
    """A simulated device with what such a product has."""
    gib = _MEMORY_GIB.get(device.arch.number)
    return dataclasses.replace(
        device,
        name=f"Acme {device.arch.number[0]}",
        memory=None if gib is None else gib << 30,
        runtime=hal.Version.parse("2.1"),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects")
    return rows


def _device(row: Mapping[str, Any], index: int) -> hal.Device:
    arch = parse_arch(str(row.get("arch", "")))
    return hal.Device(
        platform="acme",
        arch=arch,
        index=index,
        name=str(row.get("name", "")),
        memory=int(row["memory_gib"]) << 30 if "memory_gib" in row else None,
        runtime=hal.Version.parse(row.get("acmert")),
        capabilities=capabilities(arch),
    )
