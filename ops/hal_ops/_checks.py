"""Checks that requests share. Each raises ``ValueError`` with what was given and what to give."""

from __future__ import annotations

from typing import Any

__all__ = ["flag", "one_of", "positive"]


def positive(name: str, value: Any) -> None:
    """``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1")


def flag(name: str, value: Any) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: give True or False")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose {' or '.join(map(repr, choices))}")
