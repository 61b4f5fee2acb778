"""What an argument of a call has to be, before anything is asked of it: one clear error in the place of Python's own."""

from __future__ import annotations

import operator
from typing import Any

from hal.errors import InputError

__all__ = [
    "check_contiguous",
    "check_no_gradients",
    "check_step_kinds",
    "check_tensor",
    "check_tensors",
    "count",
    "whole",
]


def whole(value: Any) -> int | None:
    """A whole number of any kind as Python's own; None of anything else, True and False included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def count(name: str, value: Any, least: int = 1) -> int:
    """``value`` is a whole number of at least ``least``."""
    found = whole(value)
    if found is None:
        raise InputError(f"{name}={value!r}: give a whole number of at least {least}")
    if found < least:
        raise InputError(f"{name}={found}: give at least {least}")
    return found


def check_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is {_kind(value)}: give a tensor")


def check_tensors(**values: Any) -> None:
    """Those that are given are tensors."""
    for name, value in values.items():
        if value is not None:
            check_tensor(name, value)


def check_contiguous(name: str, value: Any) -> None:
    """No gaps between numbers: kernels read a few of them one behind the other, and would read others without a word."""
    if not value.is_contiguous():
        raise InputError(f"{name} has strides {value.stride()}: give a contiguous one")


def check_no_gradients(**values: Any) -> None:
    """None requires a gradient, which a kernel without a backward would lose without a word."""
    import torch

    for name, value in values.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, which the request does not speak of: ask for needs_grad=True, or call "
                "under torch.no_grad()"
            )


def check_step_kinds(plan: Any, cache: Any, wanted: type) -> None:
    """A step's plan and cache are what their names say."""
    from hal._plan import Plan

    for name, value, kind in (("plan", plan, Plan), ("cache", cache, wanted)):
        if value is None:
            raise InputError(f"{name} is missing: a step takes both a cache and a plan")
        if not isinstance(value, kind):
            raise InputError(f"{name} is {_kind(value)}: give a hal.{kind.__name__} of this handle")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")
