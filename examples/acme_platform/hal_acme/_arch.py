"""Acme's archs: ``acme<generation>``, with features behind plus signs."""

from __future__ import annotations

import re

import hal

__all__ = ["capabilities", "parse_arch"]

_FORM = re.compile(r"acme([1-9]\d*)((?:\+[a-z]+)*)\Z")
_CAPABILITIES: dict[tuple[int, ...], frozenset[str]] = {
    (1,): frozenset({"bf16", "fp16"}),
    (2,): frozenset({"bf16", "fp16", "tanh_unit"}),
}


def parse_arch(text: str) -> hal.Arch:
    """The arch that ``text`` names. A generation newer than this release is no error: it keeps its name.

    Raises:
        ValueError: ``text`` is not of the form ``acme2`` or ``acme2+mx``.
    """
    match = _FORM.match(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no Acme arch: write 'acme1' or 'acme2', features behind it as in 'acme2+mx'")
    number = int(match[1])
    return hal.Arch("acme", f"acme{number}", "acme", (number,), tuple(match[2].split("+")[1:]))


def capabilities(arch: hal.Arch) -> frozenset[str]:
    """What devices of ``arch`` can do. A generation that is not known here gets nothing that nobody has tried."""
    base = _CAPABILITIES.get(arch.number, frozenset())
    return base | {"fp8_e4m3fn", "fp8_e5m2"} if base and "mx" in arch.features else base
