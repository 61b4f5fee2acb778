"""Whose fault an exception is: the kernel's, or that of the inputs, the reference or the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["KernelError", "Watched", "blamed"]


class KernelError(Exception):
    """The kernel raised, or gave back what nobody can use. The text is the finding."""


def blamed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose exceptions are the kernel's fault. Running out of memory is nobody's.

    Raises:
        KernelError: the function raised.
    """
    import torch

    try:
        return function(*args, **kwargs)
    except (KernelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise KernelError(f"{type(error).__name__}: {error}") from error


class Watched:
    """An implementation whose exceptions are marked as its own, those that a device reports later included."""

    def __init__(self, bare: Callable[..., Any], device: torch.device) -> None:
        self.bare = bare
        self._device = device

    def plan(self, step: Any) -> Any:
        """The implementation's own plan."""
        return blamed(self.bare.plan, step)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return blamed(self._call_and_wait, *args, **kwargs)

    def _call_and_wait(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        result = self.bare(*args, **kwargs)
        torch.get_device_module(self._device.type).synchronize()
        return result
