"""The CUDA driver library, asked in a child process: the visible GPUs, in CUDA's order."""

from __future__ import annotations

import json
from typing import Any

from hal_nvidia._cards import Card, Reading
from hal_nvidia._system import SourceError

__all__ = ["read_driver"]


def read_driver(answer: str, driver: str) -> Reading:
    """What the child process printed; ``driver`` is the kernel module's version.

    Raises:
        SourceError: it could not ask the driver, or the driver shows nothing.
    """
    try:
        told = json.loads(answer)
    except ValueError as error:
        raise SourceError(f"the child that asks libcuda wrote {answer[:80]!r}, which is no answer") from error
    if "error" in told:
        raise SourceError(str(told["error"]), "`nvidia-smi` shows whether the driver works")
    if not told["devices"]:
        raise SourceError("the driver starts, but shows no GPU")
    version = int(told["cuda"])
    return Reading(
        source="the CUDA driver",
        cards=tuple(_card(i, row) for i, row in enumerate(told["devices"])),
        driver=driver,
        cuda=f"{version // 1000}.{version % 1000 // 10}" if version else "",
        ordered=True,
    )


def _card(position: int, row: dict[str, Any]) -> Card:
    if "problem" in row:
        return Card(position=position, problem=str(row["problem"]))
    known = row["major"] is not None and row["minor"] is not None
    return Card(
        position=position,
        uuid=f"GPU-{row['uuid']}" if row["uuid"] else "",
        pci=_pci(row),
        name=row["name"],
        capability=(row["major"], row["minor"]) if known else None,
        memory=row["memory"],
        multiprocessors=row["multiprocessors"],
        integrated=None if row["integrated"] is None else bool(row["integrated"]),
    )


def _pci(row: dict[str, Any]) -> str:
    if row["domain"] is None or row["bus"] is None or row["device"] is None:
        return ""
    return f"{row['domain']:04x}:{row['bus']:02x}:{row['device']:02x}.0"
