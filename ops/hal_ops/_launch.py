"""Launching a Triton kernel many times with little host work.

Triton's own launch looks at every argument, to find the compiled kernel that fits. :class:`Launch` asks it once for
each combination of strides and then goes to the compiled kernel, as long as the tensors that Triton looked at are
aligned as they were: on an H200 with Triton 3.6 that takes 0.6 of the host time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import triton

__all__ = ["FUSED", "Launch"]

FUSED: Mapping[str, Any] = {"enable_fp_fusion": True}
"""Products and sums become one instruction. Said at every launch: what is meant where nothing is said changes with
Triton 3.10, and 3.9 warns of that (``triton/knobs.py``, ``fp_fusion_enabled``)."""
_HANDLES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether a compiled kernel takes all arguments, constants included, as the function does (Triton 3.3 and newer)."""


class Launch:
    """One kernel on one device.

    Args:
        kernel: a ``triton.jit`` function whose constants come last.
        constants: makes the constants for a key, in the order of the function's signature.
        device: where it runs, with its ordinal; the CPU for Triton's interpreter.
        options: ``num_warps``, ``num_stages``; :data:`FUSED` is added.
    """

    def __init__(
        self, kernel: Any, constants: Callable[[Any], Mapping[str, Any]], device: torch.device, **options: Any
    ) -> None:
        self._kernel = kernel
        self._constants = constants
        self._options = {**FUSED, **options}
        self._index = device.index
        self._device = None if device.type == "cpu" else device
        self._current_device = torch.get_device_module(device).current_device
        self._made: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, programs: int, key: Hashable, *arguments: Any) -> None:
        """Launch ``programs`` programs.

        Args:
            key: must change whenever other constants are meant, or Triton would compile for other arguments: it holds
                the strides, and whether the addresses that Triton specialises on are multiples of 16.
            arguments: all but the constants.
        """
        made = self._made.get(key)
        if made is None or self._current_device() != self._index:
            self._first(programs, key, arguments)
        else:
            made[0][(programs, 1, 1)](*arguments, *made[1])

    def constants(self, key: Hashable) -> dict[str, Any]:
        """What is compiled in for a key.

        Raises:
            ValueError: these are not the last arguments of the kernel, in order.
        """
        constants = dict(self._constants(key))
        names = self._kernel.arg_names[-len(constants) :]
        if names != list(constants):
            raise ValueError(f"the constants {list(constants)} are not the last arguments of the kernel, {names}")
        return constants

    def _first(self, programs: int, key: Hashable, arguments: tuple[Any, ...]) -> None:
        constants = tuple(self.constants(key).values())
        if self._device is None:
            self._kernel[(programs,)](*arguments, *constants, **self._options)
            return
        with torch.get_device_module(self._device).device(self._device):
            compiled = self._kernel[(programs,)](*arguments, *constants, **self._options)
        if _HANDLES and compiled is not None:
            self._made[key] = compiled, constants
