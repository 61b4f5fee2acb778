"""AMD archs: the gfx string is the identity; numbers order archs inside one line only.

A gfx name is major (decimal), minor and stepping (one hexadecimal digit each): ``gfx90a`` is 9.0.10, ``gfx1151`` is
11.5.1 (LLVM, "User Guide for AMDGPU Backend", processors).
"""

from __future__ import annotations

import re

from hal import Arch

__all__ = ["UNKNOWN", "from_version", "parse_arch", "parse_override"]

# patterns as text: most processes never match them, so nothing is compiled at import
_FORM = r"(?a)(?:amdgcn-amd-amdhsa--)?gfx([1-9]\d?)([0-9a-f])([0-9a-f])((?::[a-z]+[+-])*)\Z"
_OVERRIDE = r"(?a)(\d{1,2})\.(\d{1,3})\.(\d{1,3})\Z"

_CDNA = frozenset({(9, 0, 8), (9, 0, 10), (9, 4, 0), (9, 4, 1), (9, 4, 2), (9, 5, 0)})
_GCN = frozenset({(9, 0, 0), (9, 0, 2), (9, 0, 4), (9, 0, 6), (9, 0, 9), (9, 0, 12)})

UNKNOWN = Arch("rocm", "unknown")
"""The arch of a GPU whose gfx target could not be learnt. Never equal to, nor ordered with, a real one."""


def parse_arch(text: str) -> Arch:
    """The arch that ``text`` names; ``:sramecc+:xnack-`` become features and do not change the identity.

    Raises:
        ValueError: no form of AMD's fits.
    """
    match = re.match(_FORM, str(text).strip().lower())
    if match is None:
        raise ValueError(
            f"{text!r} is no AMD arch: write 'gfx942' (features may follow, as in 'gfx942:sramecc+:xnack-'); "
            "a bare number is not accepted, because it could be another vendor's"
        )
    number = (int(match[1]), int(match[2], 16), int(match[3], 16))
    return _arch(number, tuple(match[4].split(":")[1:]))


def from_version(version: int) -> Arch:
    """The arch of a ``gfx_target_version`` of KFD: ``90402`` is gfx942, ``90010`` is gfx90a, ``110501`` is gfx1151."""
    return _arch((version // 10000, version // 100 % 100, version % 100))


def parse_override(text: str) -> Arch | None:
    """The arch of an ``HSA_OVERRIDE_GFX_VERSION`` such as ``"10.3.0"``; None where the runtime would refuse it."""
    match = re.match(_OVERRIDE, text.strip())
    return _arch((int(match[1]), int(match[2]), int(match[3]))) if match else None


def _arch(number: tuple[int, int, int], features: tuple[str, ...] = ()) -> Arch:
    major, minor, stepping = number
    if not (major and minor < 16 and stepping < 16):
        return UNKNOWN
    return Arch("rocm", f"gfx{major}{minor:x}{stepping:x}", _line(number), number, features)


def _line(number: tuple[int, int, int]) -> str:
    """``cdna``, ``rdna``, ``gcn`` or ``gfx125``. A generation that nobody has described yet belongs to no line."""
    if number in _CDNA:
        return "cdna"
    if number in _GCN:
        return "gcn"
    if number[0] in (10, 11) or number[:2] == (12, 0):
        return "rdna"
    return "gfx125" if number[:2] == (12, 5) else ""
