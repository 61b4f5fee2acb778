"""Archs: vendor-tagged hardware generations, never compared across vendors."""

from __future__ import annotations

import dataclasses

from hal_ops import record

__all__ = ["Arch"]


@record(frozen=True)
class Arch:
    """One hardware generation, as its platform names it.

    ``platform`` owns the name; ``line`` is the lineage inside which numbers can be ordered (``sm``; ``cdna`` and
    ``rdna`` are two lines of one vendor); ``number`` orders archs of one line; ``features`` are suffixes that the
    vendor prints (``sramecc+``, or the ``a`` of ``sm_90a``). Identity is the name: unknown archs keep theirs.
    """

    platform: str
    name: str
    line: str = ""
    number: tuple[int, ...] = ()
    features: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def comparable(self, other: Arch) -> bool:
        """Whether both belong to one line of one vendor."""
        return bool(self.line) and (self.platform, self.line) == (other.platform, other.line)

    def __lt__(self, other: Arch) -> bool:
        return self._ordered(other) and self.number < other.number

    def __le__(self, other: Arch) -> bool:
        return self._ordered(other) and self.number <= other.number

    def __gt__(self, other: Arch) -> bool:
        return self._ordered(other) and self.number > other.number

    def __ge__(self, other: Arch) -> bool:
        return self._ordered(other) and self.number >= other.number

    def _ordered(self, other: Arch) -> bool:
        if not isinstance(other, Arch):
            raise TypeError(f"an arch ({self}) is compared with archs only, not with {other!r}")
        if not self.comparable(other):
            raise TypeError(f"{self} and {other} have no common scale: archs are ordered inside one vendor's line only")
        return True

    def __str__(self) -> str:
        return f"{self.platform}:{self.name}"
