"""The kept signatures, as ``inspect.Signature`` objects."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from pathlib import Path
from typing import Any

__all__ = ["Unread", "functions", "signature", "versions"]

ROOT = Path(__file__).resolve().parents[3]
_KINDS = inspect.Parameter


class Unread:
    """A default that is an expression of the library's own: never equal to anything a caller passes."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __repr__(self) -> str:
        return self.source


@functools.cache
def _kept(library: str) -> dict[str, Any]:
    (path,) = ROOT.glob(f"platforms/*/signatures/{library}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["versions"]
    return found


def versions(library: str) -> tuple[str, ...]:
    """Versions that are kept, oldest first."""
    return tuple(_kept(library))


@functools.cache
def functions(library: str, version: str) -> dict[str, inspect.Signature]:
    """``"module:qualified.name"`` to signature. Methods are without ``self``."""
    return {name: _parsed(kept["parameters"]) for name, kept in _kept(library)[version]["functions"].items()}


def signature(library: str, version: str, function: str) -> inspect.Signature:
    """One function's; ``function`` may leave out the module.

    Raises:
        KeyError: the version has no such function.
    """
    found = functions(library, version)
    named = [name for name in found if function in (name, name.partition(":")[2])]
    if not named:
        raise KeyError(f"{library} {version} has no {function}; kept are {', '.join(found)}")
    return found[named[0]]


def _parsed(parameters: list[str]) -> inspect.Signature:
    made = []
    kind = _KINDS.POSITIONAL_OR_KEYWORD
    slash = parameters.index("/") if "/" in parameters else 0
    for index, text in enumerate(parameters):
        if text.startswith("**"):
            made.append(inspect.Parameter(text[2:], _KINDS.VAR_KEYWORD))
        elif text.startswith("*"):
            kind = _KINDS.KEYWORD_ONLY
            made += [inspect.Parameter(text[1:], _KINDS.VAR_POSITIONAL)] if len(text) > 1 else []
        elif text != "/":
            name, equals, default = text.partition("=")
            value = _value(default) if equals else _KINDS.empty
            made.append(inspect.Parameter(name, _KINDS.POSITIONAL_ONLY if index < slash else kind, default=value))
    return inspect.Signature(made)


def _value(source: str) -> Any:
    try:
        return ast.literal_eval(source)
    except ValueError:
        return Unread(source)
