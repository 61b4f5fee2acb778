"""Constraints: declared values that a request field may take.

A constraint is data with four questions. Out of the one declaration come the refusal reasons, the near misses, the
support tables, the corners that the conformance kit tests, and the simulation of hardware that is not there. To add a
kind of constraint, subclass :class:`Constraint` and answer the four.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from hal_ops import Request, record

__all__ = ["Anything", "Constraint", "Either", "MultipleOf", "OneOf", "Pairs", "Range", "SameAs", "Windows"]


class Constraint(ABC):
    """What one field may hold. ``request`` is given for constraints that relate fields to each other."""

    @abstractmethod
    def admits(self, value: Any, request: Request) -> bool:
        """Whether the field may hold ``value``."""

    @abstractmethod
    def allowed(self) -> str:
        """The allowed values in words, to follow "needs"."""

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        """Allowed values nearest to a refused one, for near misses."""
        return tuple(v for v in self.corners(request) if self.admits(v, request))[:1]

    def corners(self, request: Request) -> tuple[Any, ...]:
        """Allowed values worth testing: extremes and odd ones. Empty when the field has none of its own."""
        return ()


@record(frozen=True)
class Anything(Constraint):
    """Every value is handled. ``samples`` are the ones tested."""

    samples: tuple[Any, ...] = ()

    def admits(self, value: Any, request: Request) -> bool:
        return True

    def allowed(self) -> str:
        return "any value"

    def corners(self, request: Request) -> tuple[Any, ...]:
        return self.samples


@record(frozen=True)
class OneOf(Constraint):
    """A closed set: ``OneOf("float16", "bfloat16")``."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def admits(self, value: Any, request: Request) -> bool:
        return value in self.values

    def allowed(self) -> str:
        words = [str(v) for v in self.values]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if numbers and isinstance(value, (int, float)):
            return (min(numbers, key=lambda v: (abs(v - value), v)),)
        return self.values[:1]

    def corners(self, request: Request) -> tuple[Any, ...]:
        return self.values


@record(frozen=True)
class Range(Constraint):
    """Numbers from ``low`` to ``high``, both included; None is open."""

    low: float | None = None
    high: float | None = None
    samples: tuple[Any, ...] = ()

    def admits(self, value: Any, request: Request) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def allowed(self) -> str:
        if self.low is None or self.high is None:
            return f"at most {self.high:g}" if self.high is not None else f"at least {self.low or 0:g}"
        return f"{self.low:g} to {self.high:g}"

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        bound = self.low if self.low is not None and value < self.low else self.high
        return () if bound is None else (bound,)

    def corners(self, request: Request) -> tuple[Any, ...]:
        ends = tuple(v for v in (self.low, self.high) if v is not None)
        return tuple(dict.fromkeys((*ends, *self.samples)))


@record(frozen=True)
class MultipleOf(Constraint):
    """Multiples of ``step`` from ``low`` (default: ``step``) to ``high`` (None is open)."""

    step: int
    low: int | None = None
    high: int | None = None
    samples: tuple[int, ...] = ()

    def admits(self, value: Any, request: Request) -> bool:
        return value % self.step == 0 and value >= self._low() and (self.high is None or value <= self.high)

    def allowed(self) -> str:
        if self.high is not None:
            return f"a multiple of {self.step} from {self._low()} to {self.high}"
        return f"a multiple of {self.step}" + (f", at least {self._low()}" if self._low() != self.step else "")

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        up = max(self._low(), -(-value // self.step) * self.step)
        return (up if self.high is None or up <= self.high else self.high // self.step * self.step,)

    def corners(self, request: Request) -> tuple[Any, ...]:
        top = self._low() + 2 * self.step if self.high is None else self.high // self.step * self.step
        return tuple(dict.fromkeys((self._low(), min(self._low() + self.step, top), top, *self.samples)))

    def _low(self) -> int:
        return self.step if self.low is None else self.low


@record(frozen=True)
class SameAs(Constraint):
    """The value of another field: ``v_head_dim=SameAs("head_dim")``."""

    field: str

    def admits(self, value: Any, request: Request) -> bool:
        return bool(value == getattr(request, self.field))

    def allowed(self) -> str:
        return f"the same as {self.field}"

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        return (getattr(request, self.field),)

    def corners(self, request: Request) -> tuple[Any, ...]:
        return (getattr(request, self.field),)


_FEW_PAIRS = 2
_FEW_VALUES = 6


def _some(values: list[Any]) -> str:
    if len(values) > _FEW_VALUES:
        return f"one of {len(values)} from {min(values)} to {max(values)}"
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


@record(frozen=True)
class Pairs(Constraint):
    """Combinations with another field: ``v_head_dim=Pairs("head_dim", (128, 128), (192, 128))``.

    Each pair is (value of the other field, value of this one).
    """

    field: str
    pairs: tuple[tuple[Any, Any], ...]

    def __init__(self, field: str, *pairs: tuple[Any, Any]) -> None:
        object.__setattr__(self, "field", field)
        object.__setattr__(self, "pairs", pairs)

    def admits(self, value: Any, request: Request) -> bool:
        return (getattr(request, self.field), value) in self.pairs

    def allowed(self) -> str:
        same = [own for other, own in self.pairs if other == own]
        if len(same) <= _FEW_PAIRS:
            return "with " + " or ".join(f"{self.field} {other}: {own}" for other, own in self.pairs)
        rest = "".join(f", or with {self.field} {other}: {own}" for other, own in self.pairs if other != own)
        return f"the same as {self.field}, where that is {_some(same)}{rest}"

    def corners(self, request: Request) -> tuple[Any, ...]:
        return tuple(own for other, own in self.pairs if other == getattr(request, self.field))


@record(frozen=True)
class Windows(Constraint):
    """Sliding windows ``(left, right)``: which sides may be limited. Under a causal mask the right one is no limit."""

    left: bool = True
    right: bool = True

    def admits(self, value: Any, request: Request) -> bool:
        causal = getattr(request, "causal", False)
        return (value[0] is None or self.left) and (value[1] is None or self.right or causal)

    def allowed(self) -> str:
        sides = [name for name, on in (("left", self.left), ("right", self.right)) if on]
        return f"a window limited on the {' or '.join(sides)}" if sides else "no window"

    def corners(self, request: Request) -> tuple[Any, ...]:
        if getattr(request, "causal", False):
            return ((0, 0), (15, 0), (127, 0)) if self.left else ()
        lefts = ((0, None), (15, None)) if self.left else ()
        rights = ((None, 0), (None, 5)) if self.right else ()
        both = ((7, 3),) if self.left and self.right else ()
        return (*lefts, *rights, *both)


@record(frozen=True)
class Either(Constraint):
    """What at least one of several constraints admits: ``Either(SameAs("head_dim"), Pairs("head_dim", (192, 128)))``."""

    constraints: tuple[Constraint, ...]

    def __init__(self, *constraints: Constraint) -> None:
        object.__setattr__(self, "constraints", constraints)

    def admits(self, value: Any, request: Request) -> bool:
        return any(c.admits(value, request) for c in self.constraints)

    def allowed(self) -> str:
        return ", or ".join(c.allowed() for c in self.constraints)

    def nearest(self, value: Any, request: Request) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(near for c in self.constraints for near in c.nearest(value, request)))

    def corners(self, request: Request) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value for c in self.constraints for value in c.corners(request)))
