"""Decisions as tables: which kernel serves which request on which device, without the hardware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hal._device import Device
from hal._selection import Selection, select
from hal._simulate import simulate
from hal.testing._corners import request_id
from hal_ops import Request

__all__ = ["decision_matrix", "winners"]

Cell = dict[str, "str | None"]


def decision_matrix(devices: Sequence[str | Device], requests: Mapping[str, Request]) -> dict[str, dict[str, Cell]]:
    """Device to request to ``{phase: kernel}``: what :func:`hal.select` decides for each pair.

    Args:
        devices: texts in the grammar of ``hal.simulate`` (one device each), or ``Device`` objects.
        requests: name to request.

    Returns:
        Keys are the devices' texts and the requests' names, in the given order. A kernel is None where none is left.

    Libraries are those installed: wrap the call in ``hal.simulate(libraries=...)`` for others.
    """
    return {str(device): {name: _cell(device, request) for name, request in requests.items()} for device in devices}


def winners(
    requests: Mapping[str, Request] | Iterable[Request], devices: Sequence[str | Device]
) -> dict[str, list[tuple[str, str]]]:
    """Kernel to the (device, request) pairs that it is chosen for. A kernel that never wins is not in it.

    ``requests`` without names go by :func:`request_id`.
    """
    named = requests if isinstance(requests, Mapping) else {request_id(r): r for r in requests}
    found: dict[str, list[tuple[str, str]]] = {}
    for device, row in decision_matrix(devices, named).items():
        for name, cell in row.items():
            for kernel in cell.values():
                if kernel is not None:
                    found.setdefault(kernel, []).append((device, name))
    return found


def _cell(device: str | Device, request: Request) -> Cell:
    return selected(device, request).kernels()


def selected(device: str | Device, request: Request) -> Selection:
    """The selection for one simulated device."""
    with simulate(device if isinstance(device, str) else (device,)):
        return select(request)
