"""``Failures``: the kernels that could not be imported or made in this process, and for what."""

from __future__ import annotations

from typing import Any

from hal._device import Device
from hal._kernel import Kernel
from hal._reason import Reason
from hal_ops import Request

__all__ = ["Failures"]


class Failures:
    """Code that cannot be imported is gone for every request. A factory that fails does so for one: its variant does not
    compile, or there is no memory now."""

    def __init__(self) -> None:
        self._everywhere: dict[str, Reason] = {}
        self._for_requests: dict[tuple[Any, ...], Reason] = {}

    def add(self, kernel: Kernel, request: Request, device: Device, reason: Reason) -> None:
        if reason.code == "import_error":
            self._everywhere[kernel.name] = reason
        else:
            self._for_requests[_key(kernel, request, device)] = reason

    def find(self, kernel: Kernel, request: Request, device: Device) -> Reason | None:
        if kernel.name in self._everywhere:
            return self._everywhere[kernel.name]
        return self._for_requests.get(_key(kernel, request, device)) if self._for_requests else None

    def clear(self) -> None:
        self._everywhere.clear()
        self._for_requests.clear()


def _key(kernel: Kernel, request: Request, device: Device) -> tuple[Any, ...]:
    """Fields that may be left open are not looked at, or one failure would be tried again with each of their values."""
    fixed = ((n, getattr(request, n)) for n, rule in request.rules().items() if not rule.preferred)
    return (kernel.name, device.platform, device.arch.name, device.index, type(request), *fixed)
