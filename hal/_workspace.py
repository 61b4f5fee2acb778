"""Work buffers: one pool a device, frozen before a graph is captured."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from hal import _devices
from hal._device import Device
from hal.errors import InputError, WorkspaceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Workspace", "workspace"]

_pools: dict[tuple[str, int | None], Workspace] = {}
_lock = threading.Lock()
_ONE_OF = ("cpu", "meta")
"""Types of which there is one device, with an index or without."""


class Workspace:
    """Named scratch buffers on one device. A buffer keeps its address until its owner asks for a larger one.

    Kernels take from here, when they plan and never while they run, what is not a plan's own: work buffers that several
    plans share, one after the other. After :meth:`freeze`, which belongs right
    before a graph capture, no buffer may grow: captured graphs hold the addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.frozen: bool = False
        self._buffers: dict[str, Tensor] = {}

    def get(self, owner: str, num_bytes: int) -> Tensor:
        """A uint8 buffer of at least ``num_bytes``, the same one each time unless it has to grow.

        Raises:
            WorkspaceError: it has to grow and the pool is frozen; the text names the owner and both sizes.
        """
        import torch

        held = self._buffers.get(owner)
        if held is not None and held.numel() >= num_bytes:
            return held
        if self.frozen:
            raise WorkspaceError(
                f"{owner} needs {num_bytes} bytes of scratch on {self.device}, "
                f"has {0 if held is None else held.numel()}, "
                "and the workspace is frozen for graph capture: plan the largest step before the capture",
                owner=owner,
            )
        self._buffers[owner] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._buffers[owner]

    def freeze(self) -> None:
        """Refuse growth from now on."""
        self.frozen = True

    def thaw(self) -> None:
        """Allow growth again; captured graphs must be gone."""
        self.frozen = False

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() for b in self._buffers.values())


def workspace(device: Any) -> Workspace:
    """The pool of a device. Two devices never share one, and one never has two, whatever it is called.

    ``device`` is anything :func:`hal.device` takes, or a ``torch.device`` that no platform brings. One without an index is
    the current device of its type.

    Raises:
        InputError: it is nothing of that kind. DeviceError: there is no device of that name.
    """
    import torch

    where = getattr(device, "device", device)  # of a tensor, or a handle
    if not isinstance(where, torch.device):
        where = _found(where)
    index = None
    if where.type not in _ONE_OF:
        index = _devices.current_index(where.type) if where.index is None else where.index
    with _lock:
        if (where.type, index) not in _pools:
            place = torch.device(where.type) if index is None else torch.device(where.type, index)
            _pools[where.type, index] = Workspace(place)
        return _pools[where.type, index]


def _found(where: Any) -> torch.device:
    if isinstance(where, bool) or not (where is None or isinstance(where, (Device, str, int))):
        raise InputError(f"device={where!r}: give a hal.Device, a torch.device, or the name of one, such as 'cpu'")
    found: torch.device = _devices.device(where).torch_device()
    return found
