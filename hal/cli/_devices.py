"""``hal devices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from hal.cli._render import json_option, line, print_json, table

__all__ = ["command", "show_devices", "show_evidence", "size"]


@click.command("devices")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show what each platform's probe looked at, and what it saw.")
def command(as_json: bool, verbose: bool) -> None:
    """List the devices that HAL sees. No device is initialised."""
    from hal import _devices

    found, report = _devices.devices(), _devices.probe_report()
    if as_json:
        print_json({"devices": [d.as_dict() for d in found], "evidence": evidence(report)})
        return
    show_devices(found)
    if verbose:
        click.echo()
        show_evidence(report)
    elif all(d.torch_type == "cpu" for d in found):
        line("no accelerator was found; `hal devices -v` shows what each probe looked at", indent=0)


def evidence(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Platform to what its probe saw, JSON-ready."""
    return {
        name: [{"source": e.source, "text": e.text, "found": e.found, "remedy": e.remedy} for e in probe.evidence]
        for name, probe in report.items()
    }


def show_devices(found: Sequence[Any], indent: int = 0) -> None:
    """A table of devices, and under it why a version or a capability is missing."""
    headers = ("device", "arch", "name", "memory", "SMs/CUs/cores", "runtime", "driver", "usable", "capabilities")
    table(headers, [_row(d) for d in found], indent=indent)
    gaps: dict[str, list[str]] = {}
    for device in found:
        for text in _gaps(device):
            gaps.setdefault(text, []).append(device.id)
    for text, ids in gaps.items():
        line(f"{', '.join(ids)}: {text}", indent=indent)


def _row(device: Any) -> tuple[Any, ...]:
    label = " (simulated)" if device.simulated else ""
    return (
        device.id + label,
        device.arch.name,
        device.name or "-",
        size(device.memory),
        "-" if device.multiprocessors is None else str(device.multiprocessors),
        str(device.runtime) if device.runtime.known else "-",
        str(device.driver) if device.driver.known else "-",
        "no" if device.unusable else "yes",
        " ".join(sorted(device.capabilities)) or "-",
    )


def _gaps(device: Any) -> list[str]:
    """Why a column of an accelerator holds no value."""
    texts = [f"not usable: {device.unusable}"] if device.unusable else []
    if device.torch_type == "cpu":
        return texts
    for name, version in (("runtime", device.runtime), ("driver", device.driver)):
        if not version.known and not device.unusable:
            texts.append(f"{name} version {'' if device.simulated else 'could not be read: '}{version.reason}")
    if not device.capabilities:
        texts.append(f"this version of its plugin does not know {device.arch.name}, so no capability is assumed")
    return texts


def show_evidence(report: Mapping[str, Any], indent: int = 0) -> None:
    """A line for everything that a probe looked at."""
    seen = [(name, e) for name, probe in report.items() for e in probe.evidence]
    rows = [(name, e.source, e.text + (f"; {e.remedy}" if e.remedy else "")) for name, e in seen]
    table(("platform", "looked at", "saw"), rows, indent=indent)


def size(memory: int | None) -> str:
    """Bytes for people."""
    if memory is None:
        return "-"
    return f"{memory / (1 << 30):.1f} GiB" if memory >= 1 << 30 else f"{memory / (1 << 20):.0f} MiB"
