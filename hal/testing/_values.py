"""Kernels of a plugin, run where this machine has its hardware."""

from __future__ import annotations

from hal import _devices
from hal._device import Device
from hal.errors import HalError
from hal.testing._check import check
from hal.testing._corners import corners
from hal.testing._plugin_checks import Finding, Plugin
from hal.testing._verify import circumstances, refusals

__all__ = ["values"]


def values(plugin: Plugin, limit: int | None = None) -> Finding:
    """Each kernel computes what the reference does, in its corners, on one device of each arch that is here."""
    places = _places(plugin)
    found = Finding(ran=bool(places))
    if not places:
        found.notes.append(f"this machine has no usable device of {plugin.cls.name}; nothing was run")
    for place in places:
        _on(plugin, place, limit, found)
    return found


def _places(plugin: Plugin) -> list[Device]:
    """One device of each arch. Kernels for every device have only the CPU for certain."""
    kernels = tuple(plugin.platform().kernels())
    names = [plugin.cls.name, *(["cpu"] if any(not k.platforms for k in kernels) else [])]
    found: dict[str, Device] = {}
    for device in _devices.devices():
        if device.platform in names and not device.unusable and not device.simulated:
            found.setdefault(str(device.arch), device)
    return list(found.values())


def _on(plugin: Plugin, place: Device, limit: int | None, found: Finding) -> None:
    around = circumstances(place)
    for kernel in plugin.platform().kernels():
        op = around.registry.op(kernel.op)
        try:
            requests = corners(kernel, op=op, device=place, limit=limit)
        except HalError as error:
            found.problems.append(str(error))
            continue
        able = [r for r in requests if not refusals(kernel, r, around)]
        if not able:
            why = "; ".join(map(str, refusals(kernel, requests[0], around)))
            found.notes.append(f"{kernel.name} was not run on {place}: {why}")
        results = [check(kernel, request, device=place) for request in able]
        found.problems += [str(r) for r in results if not r.ok]
