"""Errata held against what is registered: a row whose names or values nothing can have would be without effect, silently.

Names that come close to a known one are taken for misspelt. Others of a platform, an arch or a library may be of a plugin
that is not installed here, and pass; a pattern of kernels has to match one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from hal._constraints import Constraint, MultipleOf, OneOf, Range
from hal._errata import Erratum
from hal._kernel import Band, Kernel
from hal._libraries import installed, normalize
from hal._registry import Registry
from hal._version import Version
from hal.errors import RegistrationError, did_you_mean
from hal_ops import AUTO, Op, Request

__all__ = ["checked_errata"]

_CLOSE = 0.75
_ENOUGH = 3


def checked_errata(rows: Iterable[Erratum], where: str, registry: Registry) -> tuple[Erratum, ...]:
    """The rows, with archs and values as devices and requests have them. ``registry`` holds everything there is.

    Raises:
        RegistrationError: a row names what nothing here is called, or a value that its field cannot hold; the text names
            the row and what is near.
    """
    rows = tuple(rows)
    try:
        registry.copy().add_errata(rows)
        served: dict[str, list[Request]] = {}
        return tuple(_Check(row, registry, served).checked() for row in rows)
    except RegistrationError as error:
        raise RegistrationError(f"{where}: {error}", name=error.name) from error


class _Check:
    def __init__(self, row: Erratum, registry: Registry, served: dict[str, list[Request]]) -> None:
        self.row = row
        self.registry = registry
        self.served = served

    def checked(self) -> Erratum:
        kernels = [k for pattern in self.row.kernels for k in self._matched(pattern)]
        self._check_platform()
        self._check_library()
        archs = tuple(dict.fromkeys(name for arch in self.row.archs for name in self._arch(arch)))
        when = {field: self._condition(field, c, kernels) for field, c in self.row.when.items()}
        return dataclasses.replace(self.row, archs=archs, when=when)

    def _wrong(self, text: str) -> RegistrationError:
        return RegistrationError(f"erratum {self.row.id!r}: {text}", name=self.row.id)

    def _matched(self, pattern: str) -> list[Kernel]:
        found = [k for k in self.registry.kernels.values() if fnmatchcase(k.name, pattern)]
        if not found:
            libraries = {k.library for k in self.registry.kernels.values()}
            near = did_you_mean(pattern, {*self.registry.kernels, *(f"{library}.*" for library in libraries)})
            raise self._wrong(
                f"no kernel here matches {pattern!r}.{near} `hal kernels` lists those there are; a plugin that is not "
                "loaded brings none"
            )
        return found

    def _check_platform(self) -> None:
        name, known = self.row.platform, self.registry.platforms
        if name and name not in known and _near(name, known):
            raise self._wrong(f"no platform is called {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")

    def _check_library(self) -> None:
        from hal._simulate import known_libraries, unknown_library

        name, known = self.row.library, known_libraries(self.registry.copy())
        if name and normalize(name) not in known and installed(name) is None and _near(normalize(name), known):
            raise self._wrong(unknown_library(name, known))
        try:
            Version.parse("1").satisfies(self.row.versions)
        except ValueError as error:
            raise self._wrong(f"versions: {error}") from error

    def _arch(self, text: str) -> tuple[str, ...]:
        """The names that devices of this arch have; a pattern stays."""
        if any(c in text for c in "*?["):
            return (text,)
        platforms = self.registry.platforms
        if self.row.platform in platforms:
            try:
                return (platforms[self.row.platform].parse_arch(text).name,)
            except ValueError as error:
                raise self._wrong(f"archs: {error}") from error
        if self.row.platform:
            return (text,)
        parsed = [arch for p in platforms.values() if (arch := _parsed(p, text)) is not None]
        exact = {arch.name for arch in parsed if arch.line}
        known = self._known_archs()
        if not exact and text not in known and not any(arch.name in known for arch in parsed) and _near(text, known):
            raise self._wrong(f"no arch is called {text!r}.{did_you_mean(text, known)}")
        return tuple(sorted(exact)) or tuple(sorted({arch.name for arch in parsed})) or (text,)

    def _known_archs(self) -> set[str]:
        declared = [archs for k in self.registry.kernels.values() for archs in k.platforms.values()]
        evidence = (arch for k in self.registry.kernels.values() for arch in k.evidence)
        return {"x86_64", "aarch64", *(n for archs in declared for n in (*archs.only, archs.at_least) if n), *evidence}

    def _condition(self, field: str, constraint: Constraint, kernels: list[Kernel]) -> Constraint:
        ops = {op.name: op for op in (self.registry.op(k.op) for k in kernels) if _has(op.request, field)}
        if not ops:
            served = sorted({k.op for k in kernels})
            raise self._wrong(f"when.{field}: no request of {' or '.join(served)} has that field")
        samples = [sample for op in ops.values() for sample in self._samples(op, kernels)]
        if isinstance(constraint, OneOf):
            values = [v for value in constraint.values for v in self._values(field, value, samples)]
            return OneOf(*dict.fromkeys(values))
        held = [value for sample in samples if (value := getattr(sample, field)) != AUTO]
        if isinstance(constraint, (Range, MultipleOf)) and not any(map(_is_number, held)):
            shown = f", such as {held[0]!r}" if held else ""
            raise self._wrong(f"when.{field}: it holds no numbers{shown}: give a list of values")
        return constraint

    def _samples(self, op: Op, kernels: list[Kernel]) -> list[Request]:
        """Requests of an op: what its reference kernels serve, which is everything, and some that the row is about."""
        from hal.testing import corners

        references = [k for k in self.registry.kernels.values() if k.op == op.name and k.band == Band.REFERENCE]
        mine = [k for k in kernels if k.op == op.name][:_ENOUGH]
        for kernel in (*references, *mine):
            if kernel.name not in self.served:
                self.served[kernel.name] = corners(kernel, op=op)
        return [request for k in dict.fromkeys((*references, *mine)) for request in self.served[k.name]]

    def _values(self, field: str, value: Any, samples: list[Request]) -> list[Any]:
        """The value as requests hold it: in one form, or more where another field decides about that."""
        if value == AUTO or (value == "fp8" and all(s.rules()[field].code == "dtype" for s in samples)):
            raise self._wrong(f"when.{field}: {value!r} is made exact before a kernel is judged; name what it becomes")
        if samples and field not in samples[0].__dataclass_fields__:
            return [self._computed(field, value, samples)]
        found: dict[Any, None] = {}
        refused = ""
        for sample in samples:
            try:
                found.setdefault(getattr(sample.replace(**{field: value}), field))
            except (TypeError, ValueError) as error:
                refused = str(error)
        if found and (value is not None or len(found) == 1):
            return list(found)
        if _is_number(value) and value >= 1 and all(type(getattr(s, field)) is int for s in samples):
            return [value]  # which goes with other values of other fields
        raise self._wrong(f"when.{field}: {refused or f'{value!r} says no value'}")

    def _computed(self, field: str, value: Any, samples: list[Request]) -> Any:
        held = getattr(samples[0], field)
        if type(value) is not type(held):
            raise self._wrong(f"when.{field}: {value!r} is none of its values, such as {held!r}")
        return value


def _near(name: str, known: Iterable[str]) -> bool:
    """Whether a name is close to a known one. One that differs in digits alone is another, and not misspelt."""
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], cutoff=_CLOSE)
    return any(re.sub(r"\d", "", n) != re.sub(r"\d", "", name.lower()) for n in near)


def _parsed(platform: Any, text: str) -> Any:
    try:
        return platform.parse_arch(text)
    except ValueError:
        return None


def _has(request: type[Request], field: str) -> bool:
    return field in request.rules() or field in request.derived


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
