"""The checks of an op before each call of its kernel, whose ever that is; see :attr:`hal_ops.Op.check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal import _settings
from hal._selection import Selection
from hal.errors import InputError
from hal_ops import resolve_target

__all__ = ["checked"]


def checked(selection: Selection, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with the checks of its op, or as it is where the op has none."""
    op = selection.op
    if op.check is None:
        return fn
    values = bool(_settings.current()["debug_checks"])
    problem = resolve_target(op.check)(selection.request, selection.device.torch_device(), values)

    def call(*args: Any, **kwargs: Any) -> Any:
        wrong = problem(*args, **kwargs)
        if wrong:
            raise InputError(f"{op.name}: {wrong}")
        return fn(*args, **kwargs)

    return call
