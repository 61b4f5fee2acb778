"""Errata: known-bad combinations of library, versions, arch and request, as data with a link."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
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

    ``when`` maps a request field to a list of bad values, or to an object with ``min``, ``max`` or ``multiple_of``.

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
    if row.get("severity", "wrong") not in SEVERITIES:
        raise RegistrationError(f"{where}: severity must be one of {', '.join(SEVERITIES)}")
    when = {field: _condition(value, f"{where}, when.{field}") for field, value in row.get("when", {}).items()}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    values["when"] = when
    return Erratum(**values)


def _condition(value: Any, where: str) -> Constraint:
    if isinstance(value, list):
        return OneOf(*value)
    if isinstance(value, dict) and set(value) == {"multiple_of"}:
        return MultipleOf(value["multiple_of"])
    if isinstance(value, dict) and value and set(value) <= {"min", "max"}:
        return Range(value.get("min"), value.get("max"))
    raise RegistrationError(f"{where}: give a list of values, or an object with min, max or multiple_of")
