"""Errata: known-bad combinations of library, versions, arch and request, as data with a link."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hal._constraints import Constraint, MultipleOf, OneOf, Range
from hal._device import Device
from hal._kernel import Kernel
from hal._libraries import installed
from hal._reason import Reason
from hal.errors import RegistrationError, did_you_mean
from hal_ops import AUTO, Request, record

__all__ = ["Erratum", "load_errata"]

SEVERITIES = ("wrong", "crash", "slow")


@record(frozen=True, kw_only=True)
class Erratum:
    """One known-bad row. It refuses the kernels it matches where every given condition holds.

    Fields:
        id: unique. kernels: shell patterns of kernel names (``"flashinfer*.extend"``). summary: what goes wrong.
        library, versions: a distribution and the specifier of its bad versions (empty: all).
        platform, archs: where (empty: everywhere). when: request field to the constraint that bad values meet.
        severity: ``"wrong"`` or ``"crash"`` refuse; ``"slow"`` is only shown. url: the report.

    Raises:
        RegistrationError: a field of another type, an unknown severity, or versions that are no specifier.
    """

    id: str
    kernels: tuple[str, ...]
    summary: str
    url: str
    severity: str = "wrong"
    library: str = ""
    versions: str = ""
    platform: str = ""
    archs: tuple[str, ...] = ()
    when: Mapping[str, Constraint] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fault = next(_faults(self), None)
        if fault is not None:
            raise RegistrationError(fault, name=str(self.id))

    def matches(self, kernel: Kernel, request: Request, device: Device) -> bool:
        """Whether the row speaks about this kernel, for this request, on this device."""
        return (
            (not self.platform or self.platform == device.platform)
            and any(fnmatchcase(kernel.name, pattern) for pattern in self.kernels)
            and (not self.archs or any(fnmatchcase(device.arch.name, a) for a in self.archs))
            and self._bad_version()
            and all(self._meets(c, getattr(request, f), request) for f, c in self.when.items() if hasattr(request, f))
        )

    def reason(self) -> Reason:
        """The refusal, with the link."""
        where = f"{self.library} {self.versions}".strip()
        text = f"known to be {self.severity}: {self.summary}" + (f" ({where})" if where else "")
        return Reason(
            "version_known_bad", f"{text} [{self.id}]", field="library", allowed=self.versions, remedy=f"see {self.url}"
        )

    @staticmethod
    def _meets(constraint: Constraint, value: Any, request: Request) -> bool:
        return value != AUTO and constraint.admits(value, request)

    def _bad_version(self) -> bool:
        if not self.library:
            return True
        version = installed(self.library)
        return version is not None and (not self.versions or version.satisfies(self.versions) is not False)


def load_errata(path: Path) -> tuple[Erratum, ...]:
    """Read errata from a JSON file: a list of rows whose keys are :class:`Erratum`'s fields.

    ``when`` maps a request field to a list of bad values, or to an object with ``min``, ``max`` or ``multiple_of``. A value
    that is a tuple in requests (a window) is a list here.

    Raises:
        RegistrationError: the file cannot be read, or a row is wrong; the text names the row.
    """
    try:
        return _load(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise RegistrationError(f"errata file {path} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=16)
def _load(path: Path, mtime: int) -> tuple[Erratum, ...]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegistrationError(f"errata file {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise RegistrationError(f"errata file {path} must hold a list of rows")
    return tuple(_row(row, f"{path}, row {i}") for i, row in enumerate(rows))


def _row(row: Any, where: str) -> Erratum:
    known = list(Erratum.__annotations__)
    if not isinstance(row, dict):
        raise RegistrationError(f"{where}: must be an object")
    for key in row:
        if key not in known:
            raise RegistrationError(f"{where}: unknown key {key!r}.{did_you_mean(key, known)}")
    missing = [k for k in ("id", "kernels", "summary", "url") if not row.get(k)]
    if missing:
        raise RegistrationError(f"{where}: lacks {', '.join(missing)}")
    conditions = row.get("when", {})
    if not isinstance(conditions, dict):
        raise RegistrationError(f'{where}: when={conditions!r} must be an object, such as {{"page_size": [8, 16]}}')
    when = {field: _condition(value, f"{where}, when.{field}") for field, value in conditions.items()}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    try:
        return Erratum(**{**values, "when": when})
    except RegistrationError as error:
        raise RegistrationError(f"{where}: {error}", name=error.name) from None


def _faults(row: Erratum) -> Iterator[str]:
    for name in ("id", "summary", "url", "severity", "library", "versions", "platform"):
        if not isinstance(getattr(row, name), str):
            yield f"{name}={getattr(row, name)!r} must be a text"
    for name in ("kernels", "archs"):
        values = getattr(row, name)
        if not isinstance(values, tuple) or not all(isinstance(v, str) and v for v in values):
            example = "torch_cpu.*" if name == "kernels" else "x86_64"
            yield f"{name}={values!r} must be a list of names or patterns, such as [{example!r}]"
    if row.severity not in SEVERITIES:
        yield f"severity must be one of {', '.join(SEVERITIES)}"
    if row.versions and not row.library:
        yield f"versions={row.versions!r} says nothing without a library"
    if row.versions and not _is_specifier(row.versions):
        yield f"versions={row.versions!r} is no specifier: write '=={row.versions}' or '<{row.versions}'"
    if not isinstance(row.when, Mapping) or not all(isinstance(c, Constraint) for c in row.when.values()):
        yield f"when={row.when!r} must map fields to constraints"


def _is_specifier(text: Any) -> bool:
    """A look at the operators, which spares most processes the import of ``packaging``."""
    return isinstance(text, str) and all(
        part.lstrip().startswith(("<", ">", "=", "!", "~")) for part in text.split(",")
    )


def _condition(value: Any, where: str) -> Constraint:
    if isinstance(value, list) and value and not any(isinstance(v, dict) for v in value):
        return OneOf(*map(_plain, value))
    if isinstance(value, dict) and set(value) == {"multiple_of"}:
        if not _is_number(value["multiple_of"]) or value["multiple_of"] < 1 or value["multiple_of"] % 1:
            raise RegistrationError(
                f"{where}: multiple_of={value['multiple_of']!r} must be a whole number of at least 1"
            )
        return MultipleOf(int(value["multiple_of"]))
    if isinstance(value, dict) and value and set(value) <= {"min", "max"}:
        for key, bound in value.items():
            if not _is_number(bound):
                raise RegistrationError(f"{where}: {key}={bound!r} must be a number")
        if value.get("min", -math.inf) > value.get("max", math.inf):
            raise RegistrationError(
                f"{where}: min={value['min']} is above max={value['max']}, so that nothing meets it"
            )
        return Range(value.get("min"), value.get("max"))
    raise RegistrationError(f"{where}: give a list of values, or an object with min, max or multiple_of")


def _plain(value: Any) -> Any:
    """Requests hold tuples where JSON has lists."""
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
