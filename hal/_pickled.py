"""Selections in pickles: what one says of itself, read without the plugins, devices and settings that it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hal._choice import PhaseChoice
from hal._constraints import Anything
from hal._kernel import Kernel
from hal._selection import Selection

__all__ = ["Told", "reduced"]


class Told(Selection):
    """A selection that was read from a pickle: it repeats what it said where it was decided."""

    _said: Mapping[str, Any]

    def explain(self) -> str:
        return str(self._said["explanation"])

    def near_misses(self) -> tuple[Any, ...]:
        return tuple(self._said["near_misses"])

    def as_dict(self) -> dict[str, Any]:
        return dict(self._said["facts"])

    def receipt(self) -> dict[str, Any]:
        return dict(self._said["receipt"])

    def __reduce__(self) -> tuple[Any, ...]:
        return read, (dict(vars(self)),)


def reduced(selection: Selection) -> tuple[Any, ...]:
    """How a selection is pickled: its facts, and no function, registry or lock."""
    plain: dict[str, Kernel] = {}
    said = {
        "explanation": selection.explain(),
        "near_misses": selection.near_misses(),
        "facts": selection.as_dict(),
        "receipt": selection.receipt(),
    }
    choices = {phase: _told(choice, plain) for phase, choice in selection.choices.items()}
    kept = {"choices": choices, "around": None, "_said": said}
    return read, ({**vars(selection), **kept},)


def read(facts: dict[str, Any]) -> Told:
    """The selection of these facts."""
    told = Told.__new__(Told)
    vars(told).update(facts)
    return told


def _told(choice: PhaseChoice, plain: dict[str, Kernel]) -> PhaseChoice:
    def without_code(kernel: Kernel) -> Kernel:
        if kernel.name not in plain:
            plain[kernel.name] = _plain(kernel)
        return plain[kernel.name]

    kernel = None if choice.kernel is None else without_code(choice.kernel)
    candidates = tuple(dataclasses.replace(c, kernel=without_code(c.kernel)) for c in choice.candidates)
    return PhaseChoice(choice.phase, kernel, choice.forced, choice.measured, _Candidates(candidates))


def _plain(kernel: Kernel) -> Kernel:
    """The declaration as data: no code of a plugin is needed to read it. :class:`hal.Anything` stands where a plugin has
    its own kind of constraint."""
    ours = Anything.__module__
    fields = {name: c if type(c).__module__ == ours else Anything() for name, c in kernel.fields.items()}
    facts: dict[str, Any] = {n: dict(v) if isinstance(v, Mapping) else v for n, v in vars(kernel).items()}
    return Kernel(**{**facts, "fields": fields, "check": None, "built_archs": None})


class _Candidates:
    """Candidates that were judged before."""

    def __init__(self, candidates: tuple[Any, ...]) -> None:
        self.candidates = candidates

    def __call__(self) -> tuple[Any, ...]:
        return self.candidates
