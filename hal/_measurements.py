"""Measured order: what ``hal tune`` timed on this machine, and when it may decide.

A measured kernel overtakes the declared order only if it is verified on this device (a wrong kernel is never fast
enough), and by more than the noise of its measurement and :data:`MARGIN`. Where a version of the device is unknown,
nothing is: another driver could not be told from this one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hal._eligibility import Circumstances
from hal._kernel import Kernel
from hal._ledger import file_stamp, identity, write_json
from hal.errors import HalError
from hal_ops import Request, record

__all__ = ["MARGIN", "Measurement", "Measurements", "request_key"]

FORMAT = 1
MARGIN = 0.05
"""Share by which a kernel must be faster than the declared first to overtake it."""


@record(frozen=True)
class Measurement:
    """Median time of one kernel for one request; ``spread`` is the interquartile range, in microseconds."""

    kernel: str
    key: dict[str, str]
    request: str
    microseconds: float
    spread: float
    date: str = ""


def request_key(request: Request) -> str:
    """The digest that measurements go by: the request, whatever phases the caller uses."""
    return request.replace(phases=None).digest() if hasattr(request, "phases") else request.digest()


class Measurements:
    """The rows of one file, ``<cache dir>/measurements.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> tuple[Measurement, ...]:
        """Every row.

        Raises:
            HalError: the file is damaged; its text says what to do.
        """
        try:
            stamp = file_stamp(self.path)
        except OSError:
            return ()
        return _rows(self.path, stamp)

    def get(self, kernel: Kernel, request: Request, around: Circumstances) -> float | None:
        """Median microseconds of this kernel for this request here, if it was measured."""
        row = self._find(kernel, request, around)
        return None if row is None else row.microseconds

    def order(self, eligible: list[Kernel], request: Request, around: Circumstances) -> tuple[list[Kernel], bool]:
        """The kernels best first, and whether a measurement changed the declared order."""
        if len(eligible) < 2 or around.settings["tune"] == "off" or around.device.simulated or not self.rows():
            return eligible, False
        first = self._find(eligible[0], request, around)
        rows = [
            (k, row)
            for k in eligible[1:]
            if (row := self._find(k, request, around)) is not None and _verified(k, request, around)
        ]
        if first is None or not rows:
            return eligible, False
        winner, row = min(rows, key=lambda pair: (pair[1].microseconds, pair[0].name))
        gain = first.microseconds - row.microseconds
        if gain <= max(MARGIN * first.microseconds, first.spread, row.spread):
            return eligible, False
        return [winner, *(k for k in eligible if k is not winner)], True

    def record(self, rows: Iterable[Measurement]) -> None:
        """Add rows; a row of the same kernel, device, versions and request is replaced."""
        new = list(rows)
        taken = [(r.kernel, r.key, r.request) for r in new]
        kept = [r for r in self.rows() if (r.kernel, r.key, r.request) not in taken]
        write_json(self.path, {"format": FORMAT, "rows": [dataclasses.asdict(r) for r in [*kept, *new]]})

    def _find(self, kernel: Kernel, request: Request, around: Circumstances) -> Measurement | None:
        rows = [r for r in self.rows() if r.kernel == kernel.name]
        if not rows or around.device.simulated:
            return None
        key, digest = identity(kernel, around.device), request_key(request)
        if "unknown" in key.values():
            return None
        return next((r for r in rows if r.request == digest and r.key == key), None)


def _verified(kernel: Kernel, request: Request, around: Circumstances) -> bool:
    row = around.ledger_row(kernel, request)
    return row is not None and row.status == "verified"


@lru_cache(maxsize=8)
def _rows(path: Path, stamp: tuple[int, ...]) -> tuple[Measurement, ...]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, and this hal reads {FORMAT}")
        return tuple(Measurement(**row) for row in data["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise HalError(
            f"the measurements {path} are damaged ({error}): delete them and run `hal tune` again"
        ) from error
