"""Emulations whose parameters are found by name: one function answers for versions that order theirs differently."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from emulated.signatures import Unread

__all__ = ["by_name"]


def by_name(core: Callable[..., Any], signature: inspect.Signature, *, method: bool = False) -> Callable[..., Any]:
    """``core`` under the parameters of ``signature``: it gets those that it names, whatever their order.

    Raises:
        TypeError: of the result, for arguments that do not bind.
        NotImplementedError: of the result, for one that is not at its default and that ``core`` does not know.
    """
    known = inspect.signature(core).parameters
    rest = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL), "")

    @functools.wraps(core)
    def emulation(*args: Any, **kwargs: Any) -> Any:
        own, args = (args[:1], args[1:]) if method else ((), args)
        given = signature.bind(*args, **kwargs).arguments
        more = given.pop(rest, ())
        for name, value in given.items():
            if name not in known and not _at_default(signature.parameters[name].default, value):
                raise NotImplementedError(f"the emulation of {core.__qualname__} does not know {name}={value!r}")
        taken = {name: value for name, value in given.items() if name in known and not isinstance(value, Unread)}
        return core(*own, *_leading(known, taken, method), *more, **taken)

    return emulation


def _leading(known: Any, taken: dict[str, Any], method: bool) -> list[Any]:
    """Arguments that stand before ``*args`` have to be passed by position."""
    names = list(known)[1 if method else 0 :]
    if not any(p.kind is p.VAR_POSITIONAL for p in known.values()):
        return []
    before = names[: next(i for i, n in enumerate(names) if known[n].kind is known[n].VAR_POSITIONAL)]
    return [taken.pop(name) for name in before if name in taken]


def _at_default(default: Any, value: Any) -> bool:
    return value is default or (not hasattr(value, "shape") and value == default)
