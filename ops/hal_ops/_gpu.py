"""What a Triton kernel's host code asks about the device it is made for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

__all__ = ["Gpu", "gpu_of"]

_INTERPRETED = 4
"""Multiprocessors that the CPU is taken to have, where kernels run in Triton's interpreter."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """``arch`` (``"sm_90"``, ``"gfx942"``; empty if unknown), ``multiprocessors``, and the device, with its ordinal."""

    arch: str
    multiprocessors: int
    device: torch.device


def gpu_of(device: Any) -> Gpu:
    """The facts of what a factory was given: a ``hal`` device, a ``torch.device`` or its name, or None (the current).

    A ``hal`` device that says how many multiprocessors it has is believed; else the runtime is asked.
    """
    arch = getattr(getattr(device, "arch", None), "name", "")
    where = _where(device)
    if where.type == "cpu":
        return Gpu(arch, _INTERPRETED, where)
    found = getattr(device, "multiprocessors", None)
    properties = torch.get_device_module(where).get_device_properties(where)
    return Gpu(arch or _arch(properties), found or properties.multi_processor_count, where)


def _where(device: Any) -> torch.device:
    where: torch.device
    if hasattr(device, "torch_device"):
        where = device.torch_device()
    else:
        where = torch.device("cuda" if device is None else device)
    if where.type == "cpu" or where.index is not None:
        return where
    return torch.device(where.type, torch.get_device_module(where).current_device())


def _arch(properties: Any) -> str:
    """The name of an arch of CUDA or ROCm; empty for other runtimes."""
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}" if torch.version.cuda else ""
