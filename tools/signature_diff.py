"""What changed between two sets of kept signatures, in lines for people.

A parameter may be new, gone, or renamed (which shows as both), take another default, become keyword-only or positional,
or stand elsewhere among those that both versions have. New ones are shown with the one they stand behind, for whoever
passes by position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Parameter", "changes", "differences", "parameters"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """``name`` with its stars, default as source (None: it has none), and how it may be passed."""

    name: str
    default: str | None
    kind: str

    def __str__(self) -> str:
        return self.name if self.default is None else f"{self.name}={self.default}"


def parameters(kept: list[str]) -> list[Parameter]:
    """From the kept form, in which ``*`` and ``/`` are items of their own."""
    found: list[Parameter] = []
    kind = "positional"
    for text in kept:
        name, equals, default = text.partition("=")
        if text == "/":
            found = [dataclasses.replace(p, kind="positional-only") for p in found]
        elif name.startswith("**"):
            found.append(Parameter(name, None, "keywords"))
        elif name.startswith("*"):
            kind = "keyword-only"
            found += [Parameter(name, None, "positionals")] if len(name) > 1 else []
        else:
            found.append(Parameter(name, default if equals else None, kind))
    return found


def changes(before: list[str], after: list[str]) -> list[str]:
    """What became of the parameters, a line each; ``+`` new, ``-`` gone, ``~`` changed, ``>`` moved."""
    old, new = ({p.name: p for p in parameters(kept)} for kept in (before, after))
    lines = [f"- {p}" for name, p in old.items() if name not in new]
    lines += [f"+ {p}, {_place(p, list(new))}" for name, p in new.items() if name not in old]
    lines += [line for name in old if name in new for line in _changed(old[name], new[name])]
    return [*lines, *_moved(old, new)]


def _place(parameter: Parameter, names: list[str]) -> str:
    where = names.index(parameter.name)
    behind = f"after {names[where - 1]}" if where else "first"
    return behind if parameter.kind == "positional" else f"{parameter.kind}, {behind}"


def _changed(before: Parameter, after: Parameter) -> Iterator[str]:
    if before.default != after.default:
        yield f"~ {after.name}: default {_or_none(after.default)}, was {_or_none(before.default)}"
    if before.kind != after.kind:
        yield f"~ {after.name}: {after.kind}, was {before.kind}"


def _or_none(default: str | None) -> str:
    return "none (required)" if default is None else default


def _moved(old: Mapping[str, Parameter], new: Mapping[str, Parameter]) -> list[str]:
    """Positional parameters that stand elsewhere, for callers that pass as many as both versions have."""
    shared = [n for n in old if n in new and "positional" in old[n].kind and "positional" in new[n].kind]
    now = [n for n in new if n in shared]
    if shared == now:
        return []
    first = next(i for i, (a, b) in enumerate(zip(shared, now, strict=True)) if a != b)
    return [f"> order: {', '.join(now[first:])}; was {', '.join(shared[first:])}"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], label: str) -> list[str]:
    """What changed between two sets of functions: a heading with ``label``, then the functions and their parameters.

    ``old`` and ``new`` map a function to ``{"parameters": [...]}``. Empty where nothing changed.
    """
    lines = [f"  {name} is gone" for name in old if name not in new]
    for name, now in new.items():
        if name not in old:
            lines.append(f"  {name} is new: ({', '.join(now['parameters'])})")
            continue
        found = changes(old[name]["parameters"], now["parameters"])
        lines += [f"  {name}", *(f"    {line}" for line in found)] if found else []
    return [label, *lines] if lines else []
