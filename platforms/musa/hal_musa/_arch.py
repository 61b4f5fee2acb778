"""Moore Threads archs: ``mp_<major><minor>``, as MUSA's compiler names them (``--offload-arch=mp_31``)."""

from __future__ import annotations

import re

from hal import Arch

__all__ = ["UNKNOWN", "from_number", "parse_arch"]

# patterns as text: most processes never match them, so nothing is compiled at import
_PACKED = r"(?a)(?:mp[ _-]?)?([1-9])\.?(\d)\Z"
_PAIR = r"(?a)(?:\(\s*([1-9])\s*,\s*(\d)\s*\)|([1-9])\s*,\s*(\d))\Z"

UNKNOWN = Arch("musa", "unknown")
"""The arch of a GPU whose generation could not be learnt. Never equal to, nor ordered with, a real one."""


def parse_arch(text: str) -> Arch:
    """The arch that ``text`` names: one digit of major and one of minor version.

    ``mp_310`` is refused: MUSA's macro ``__MUSA_ARCH__`` writes 3.1 as 310, and 31.0 is no arch.

    Raises:
        ValueError: no form of Moore Threads' fits.
    """
    plain = str(text).strip().lower()
    if match := re.match(_PACKED, plain):
        return from_number(int(match[1]), int(match[2]))
    if match := re.match(_PAIR, plain):
        return from_number(int(match[1] or match[3]), int(match[2] or match[4]))
    raise ValueError(f"{text!r} is no Moore Threads arch: write 'mp_31' (or 'mp31', '31', '3.1', '(3, 1)')")


def from_number(major: int, minor: int) -> Arch:
    """The arch of MUSA compute capability ``major.minor``."""
    return Arch("musa", f"mp_{major}{minor}", "mp", (major, minor))
