"""Work buffers: one pool a device, frozen before a graph is captured."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hal.errors import WorkspaceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Workspace", "workspace"]

_pools: dict[tuple[str, int | None], Workspace] = {}
_lock = threading.Lock()


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


def workspace(device: torch.device) -> Workspace:
    """The pool of a device. Two devices never share one."""
    key = (device.type, device.index)
    with _lock:
        if key not in _pools:
            _pools[key] = Workspace(device)
        return _pools[key]
