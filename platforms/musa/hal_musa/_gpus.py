"""GPUs: facts as their source states them, before anything is known about visibility."""

from __future__ import annotations

from hal import Arch
from hal_musa._arch import UNKNOWN
from hal_ops import record

__all__ = ["Gpu", "Reading", "plural"]


@record(frozen=True, kw_only=True)
class Gpu:
    """One GPU. What the source does not tell is None or empty; ``problem`` says why it cannot be used."""

    position: int
    arch: Arch = UNKNOWN
    name: str = ""
    memory: int | None = None
    multiprocessors: int | None = None
    uuid: str = ""
    pci: str = ""
    problem: str = ""

    def like(self, other: Gpu) -> bool:
        """Whether both have the same facts, so that it does not matter which of them an ordinal means."""
        return (self.arch, self.name, self.memory, self.problem) == (
            other.arch,
            other.name,
            other.memory,
            other.problem,
        )


@record(frozen=True, kw_only=True)
class Reading:
    """What one source said. ``ordered``: the GPUs are the visible ones already, in MUSA's order."""

    source: str
    gpus: tuple[Gpu, ...]
    driver: str = ""
    ordered: bool = False
    untold: tuple[str, ...] = ()


def plural(count: int, noun: str) -> str:
    """``"1 GPU"``, ``"8 GPUs"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
