"""NVIDIA archs: every spelling of a compute capability becomes one ``sm_<major><minor>``."""

from __future__ import annotations

import re

from hal import Arch

__all__ = ["UNKNOWN", "from_number", "parse_arch"]

# patterns as text: most processes never match them, so nothing is compiled at import
_PACKED = r"(?a)(?:(?:sm|compute)[ _-]?)?([1-9]\d?)\.?(\d)([af]?)\Z"
_PAIR = r"(?a)(?:\(\s*([1-9]\d?)\s*,\s*(\d)\s*\)|([1-9]\d?)\s*,\s*(\d))\Z"

UNKNOWN = Arch("nvidia", "unknown")
"""The arch of a card whose compute capability could not be learnt. Never equal to, nor ordered with, a real one."""


def parse_arch(text: str) -> Arch:
    """The arch that ``text`` names. The last digit is the minor version: ``sm_120`` is 12.0, ``sm_103`` is 10.3.

    A suffix ``a`` (arch-specific) or ``f`` (family) becomes a feature; it does not change the identity.

    Raises:
        ValueError: no form of NVIDIA's fits.
    """
    plain = str(text).strip().lower()
    if match := re.match(_PACKED, plain):
        return from_number(int(match[1]), int(match[2]), match[3])
    if match := re.match(_PAIR, plain):
        return from_number(int(match[1] or match[3]), int(match[2] or match[4]))
    raise ValueError(
        f"{text!r} is no NVIDIA arch: write 'sm_90' (or 'sm90', 'sm_90a', 'compute_90', '90', '9.0', '(9, 0)'); "
        "the last digit is the minor version"
    )


def from_number(major: int, minor: int, suffix: str = "") -> Arch:
    """The arch of compute capability ``major.minor``."""
    return Arch("nvidia", f"sm_{major}{minor}", "sm", (major, minor), (suffix,) if suffix else ())
