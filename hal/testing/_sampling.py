"""Values to test a field with, where its declaration leaves the choice."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hal._constraints import Anything
from hal_ops import Request

__all__ = ["LARGEST", "admitted", "bounded", "centred", "size", "usual"]

LARGEST = 1024
"""Whole numbers above this are not tested: the declaration may admit more than a test can hold."""
_INTS, _FLOATS, _BOOLS = (8, 1, 3), (0.5, 30.0), (True, False)


def admitted(constraint: Any, value: Any, request: Request) -> bool:
    """Whether a constraint lets a value in, asked before all fields of the request are known."""
    return isinstance(constraint, Anything) or bool(constraint is not None and constraint.admits(value, request))


def usual(kind: str) -> tuple[Any, ...]:
    """Values for a field whose declaration names none, by its annotation."""
    words = re.findall(r"\w+", kind)
    for word, values in (("bool", _BOOLS), ("int", _INTS), ("float", _FLOATS)):
        if word in words:
            return values
    return ()


def bounded(values: list[Any]) -> list[Any]:
    """Without the numbers that are too large to test, unless there are no others: then the smallest."""
    small = [v for v in values if not (isinstance(v, int) and v > LARGEST)]
    return small or (values[:1] and [min(values)])


def centred(values: list[Any]) -> tuple[Any, ...]:
    """Numbers from the middle outwards, others as they come: the plain value is seldom at an end."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return tuple(values)
    ordered = sorted(values)
    middle = min(len(ordered) // 2, max(sum(v <= 256 for v in ordered) - 1, 0))
    return tuple(sorted(values, key=lambda v: (abs(ordered.index(v) - middle), v)))


def size(given: Mapping[str, Any]) -> int:
    """The product of all whole numbers: a bound of what tensors of these sizes hold."""
    return math.prod(v for v in given.values() if isinstance(v, int) and not isinstance(v, bool))
