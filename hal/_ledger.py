"""The ledger: which (kernel, device, library versions, request corner) was verified, and which failed.

What is not in it is only claimed. Rows are written by ``hal verify`` (see ``hal.testing``) and read by selection: a
failed row quarantines its kernel for that corner, on such a device, with those library versions.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hal import _plugins
from hal._device import Device
from hal._kernel import Kernel
from hal._libraries import installed
from hal._version import Version
from hal.errors import HalError
from hal_ops import AUTO, Request, record

__all__ = ["Ledger", "Row", "identity"]

FORMAT = 1


@record(frozen=True)
class Row:
    """One result: ``status`` is ``"verified"`` or ``"failed"``; ``corner`` is ``Request.corner(phase)``.

    ``request`` is what was run, as ``Request.as_dict()``, so that a failure can be tried again.
    """

    kernel: str
    key: dict[str, str]
    corner: dict[str, Any]
    status: str
    detail: str = ""
    date: str = ""
    request: dict[str, Any] = dataclasses.field(default_factory=dict)

    def covers(self, request: Request, phase: str) -> bool:
        """Whether the request lies in the row's corner. A field left to the selection may become what was verified;
        what failed rules out one value of it only."""
        mine = request.corner(phase)
        allowed = (AUTO,) if self.status == "verified" else ()
        return all(mine.get(name) in (*allowed, value) for name, value in self.corner.items())


def identity(kernel: Kernel, device: Device) -> dict[str, str]:
    """What a result depends on beside the request: the device, and the versions of torch, of what is needed, and of the
    distribution that brings the kernel."""
    names = {"torch": ("torch",), "triton": ("triton",), **{n.library: n.names() for n in kernel.needs}}
    found = {name: next((v for d in dists if (v := installed(d))), None) for name, dists in names.items()}
    versions = {name: str(version) for name, version in found.items() if isinstance(version, Version)}
    source = _plugins.registry((kernel.op,), device.platform).sources.get(f"kernel:{kernel.name}")
    return {**device.identity(), **versions, **({"plugin": str(source)} if source else {})}


class Ledger:
    """The rows of one file, ``<cache dir>/ledger.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> tuple[Row, ...]:
        """Every row.

        Raises:
            HalError: the file is damaged; its text says what to do.
        """
        try:
            stamp = file_stamp(self.path)
        except OSError:
            return ()
        return _rows(self.path, stamp)

    def find(self, kernel: Kernel, request: Request, device: Device) -> Row | None:
        """The row that speaks about this kernel here: a failed one before a verified one."""
        rows = [r for r in self.rows() if r.kernel == kernel.name and r.covers(request, kernel.phase)]
        if not rows:
            return None
        key = identity(kernel, device)
        rows = sorted((r for r in rows if r.key == key), key=lambda r: r.status != "failed")
        return rows[0] if rows else None

    def record(self, rows: Iterable[Row]) -> None:
        """Add rows; a row of the same kernel, device, versions and corner is replaced. The file is replaced at once."""
        new = list(rows)
        taken = [(r.kernel, r.key, r.corner) for r in new]
        kept = [r for r in self.rows() if (r.kernel, r.key, r.corner) not in taken]
        write_json(self.path, {"format": FORMAT, "rows": [dataclasses.asdict(r) for r in [*kept, *new]]})


@lru_cache(maxsize=8)
def _rows(path: Path, stamp: tuple[int, ...]) -> tuple[Row, ...]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, and this hal reads {FORMAT}")
        return tuple(Row(**row) for row in data["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise HalError(f"the ledger {path} is damaged ({error}): delete it and run `hal verify` again") from error


def file_stamp(path: Path) -> tuple[int, ...]:
    """What tells one version of a file from the next, even where two are written within one tick of the clock."""
    state = os.stat(path)
    return state.st_mtime_ns, state.st_ino, state.st_size


def write_json(path: Path, data: Any) -> None:
    """Replace a file by JSON, whole or not at all."""
    import tempfile

    text = json.dumps(data, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
