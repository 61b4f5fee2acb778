"""GPUs: facts as their source states them, before anything is known about visibility."""

from __future__ import annotations

from hal import Arch
from hal_ops import record
from hal_rocm._arch import UNKNOWN

__all__ = ["Gpu", "Reading", "plural"]


@record(frozen=True, kw_only=True)
class Gpu:
    """One GPU (or partition of one). What the source does not tell is None or empty.

    ``node`` is KFD's number, ``hsa_node`` the runtime's (nodes that this process may not see are not counted);
    ``problem`` says why the GPU cannot be used.
    """

    arch: Arch = UNKNOWN
    name: str = ""
    memory: int | None = None
    units: int | None = None
    uuid: str = ""
    pci: str = ""
    node: int | None = None
    hsa_node: int | None = None
    render: int | None = None
    pci_vendor: int | None = None
    pci_device: int | None = None
    hardware_arch: str = ""
    problem: str = ""


@record(frozen=True, kw_only=True)
class Reading:
    """What one source said. ``ordered``: the GPUs are the visible ones already, in HIP's order."""

    source: str
    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...] = ()
    ordered: bool = False


def plural(count: int, noun: str) -> str:
    """``"1 GPU"``, ``"8 GPUs"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
