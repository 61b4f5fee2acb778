"""Requests: the full, frozen description of what a caller needs from an op.

A request is a frozen dataclass whose fields say how kernels must treat them:

* a **required** field must be constrained by every kernel whose phase it applies to; a kernel that forgets it is
  rejected when it is registered;
* a **feature** field has a neutral value; any other value is refused by a kernel that does not declare the field.

So nothing that a caller asks for can be dropped by a kernel that has never heard of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

from hal_ops._record import record

__all__ = ["AUTO", "FieldRule", "Request", "feature", "required"]

AUTO = "auto"
"""Value of a field that the selection is asked to choose (``page_size``, ``kv_layout``)."""

_RULE = "hal"
R = TypeVar("R", bound="Request")


@record(frozen=True)
class FieldRule:
    """How selection treats one field of a request.

    ``neutral`` is the value that needs no declaration (a callable is given the request, which computes it where the
    field is None); ``phases`` limits the rule to
    those phases of the op; ``code`` is the reason code of a refusal; ``preferred`` lists the values tried, in order,
    when the field is left to the selection (``AUTO``); with ``closed`` no other is, whatever kernels declare. ``plain`` is
    what a required field that may ask for a feature (a cache of another format, more queries a row) holds when it asks for
    none (a callable is given the request).
    """

    required: bool
    neutral: Any = None
    phases: tuple[str, ...] | None = None
    code: str = "feature_unsupported"
    preferred: tuple[Any, ...] = ()
    closed: bool = False
    plain: Any = None

    def applies(self, phase: str) -> bool:
        """Whether kernels of the phase look at the field."""
        return self.phases is None or phase in self.phases


def required(
    *,
    default: Any = dataclasses.MISSING,
    phases: tuple[str, ...] | None = None,
    code: str = "feature_unsupported",
    preferred: tuple[Any, ...] = (),
    closed: bool = False,
    plain: Any = None,
) -> Any:
    """A dataclass field that every kernel must constrain."""
    rule = FieldRule(True, None, phases, code, preferred, closed, plain)
    return dataclasses.field(default=default, metadata={_RULE: rule})


def feature(
    neutral: Any,
    *,
    default: Any = dataclasses.MISSING,
    phases: tuple[str, ...] | None = None,
    code: str = "feature_unsupported",
) -> Any:
    """A dataclass field that a kernel may leave undeclared only while it holds its neutral value."""
    start = (None if callable(neutral) else neutral) if default is dataclasses.MISSING else default
    return dataclasses.field(default=start, metadata={_RULE: FieldRule(False, neutral, phases, code)})


class Request:
    """Base of every op's request, a frozen dataclass. Hashable; values are normalised in ``__post_init__``, once."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    op: ClassVar[str]
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of properties that kernels may constrain as if they were fields."""

    @classmethod
    @cache
    def rules(cls) -> Mapping[str, FieldRule]:
        """Field name to rule, for the fields that selection looks at."""
        return {f.name: f.metadata[_RULE] for f in dataclasses.fields(cls) if _RULE in f.metadata}

    def is_neutral(self, name: str) -> bool:
        """Whether the field ``name`` holds the value that needs no declaration."""
        neutral = self.rules()[name].neutral
        return bool(getattr(self, name) == (neutral(self) if callable(neutral) else neutral))

    def turns_on(self, name: str) -> bool:
        """Whether the field ``name`` asks for a feature: more than the plainest request of these sizes and formats does."""
        rule, value = self.rules()[name], getattr(self, name)
        if not rule.required:
            return not self.is_neutral(name)
        plain = rule.plain(self) if callable(rule.plain) else rule.plain
        return plain is not None and value != AUTO and bool(value != plain)

    def replace(self: R, **changes: Any) -> R:
        """A copy with some fields changed, normalised again. Computed neutral values that were in force follow."""
        follow = {n: None for n, rule in self.rules().items() if callable(rule.neutral) and self.is_neutral(n)}
        return dataclasses.replace(self, **{**follow, **changes})

    def resolved(self: R, capabilities: frozenset[str]) -> R:
        """The request with names that depend on the device (such as a bare ``fp8``) made exact."""
        return self

    def extra_keywords(self, phase: str) -> tuple[str, ...]:
        """Keywords that calls of this request may bring beside those that the op names for every request."""
        return ()

    def open_fields(self) -> tuple[str, ...]:
        """Names of the fields left to the selection."""
        return tuple(name for name in self.rules() if getattr(self, name) == AUTO)

    def corner(self, phase: str) -> dict[str, Any]:
        """The part of the request that decides which code path a kernel takes, for the ledger."""
        return {
            name: getattr(self, name) if rule.required else self._difference(name)
            for name, rule in self.rules().items()
            if rule.applies(phase)
        }

    def _difference(self, name: str) -> bool | str:
        """Whether a feature is in force; which one, where it is a choice between names."""
        value = getattr(self, name)
        return not self.is_neutral(name) and (value if isinstance(value, str) else True)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def digest(self) -> str:
        """A short stable hash of the request, the same in every process."""
        text = json.dumps({"op": self.op, **self.as_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for people."""
        return ", ".join(f"{name} {_plain(getattr(self, name))}" for name in self.rules())


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
