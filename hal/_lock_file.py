"""Lock files: receipts on disk, one for each request and kind of device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hal._ledger import write_json
from hal.errors import LockError
from hal_ops import AUTO

__all__ = ["differences", "key_of", "read_lock", "where", "write_lock"]

FORMAT = 1
_TEXTS = ("op", "request_digest", "platform", "arch", "digest", "reasons_digest")
_OBJECTS = ("request", "fields", "kernels")


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a decision is about: the request, and the kind of device."""
    return (row["request_digest"], row["platform"], row["arch"])


def write_lock(path: str | os.PathLike[str], receipts: Iterable[Mapping[str, Any]]) -> None:
    """Write a lock file of receipts, sorted; ``HAL_LOCK=path`` then repeats these decisions or fails.

    Raises:
        LockError: two of the receipts decide one request differently, and a file can repeat one of them only.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in map(dict, receipts):
        _check_one(rows.setdefault(key_of(row), row), row, f"lock file {path} is not written")
        rows[key_of(row)] = row
    write_json(Path(path), {"format": FORMAT, "decisions": [rows[key] for key in sorted(rows)]})


def _check_one(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    if one["digest"] != other["digest"]:
        lines = differences(one, other)
        listed = "\n".join(f"  {line}" for line in lines)
        raise LockError(
            f"{what}: there are two decisions for {where(one)}\n{listed}\n"
            "leave one of them out; what an argument of the call forces stands above the lock file, and needs none",
            differences=tuple(lines),
        )


def read_lock(path: Path) -> tuple[dict[str, Any], ...]:
    """The receipts of a lock file.

    Raises:
        LockError: the file is missing or damaged; the text names the decision that is wrong.
    """
    try:
        return _read(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise LockError(f"lock file {path} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _read(path: Path, stamp: int) -> tuple[dict[str, Any], ...]:
    what = f"lock file {path} is damaged"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LockError(f"{what}: {error}") from error
    fault = _file_fault(data)
    if fault:
        raise LockError(f"{what}: {fault}")
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, row in enumerate(data["decisions"]):
        fault = _fault(row)
        if fault:
            raise LockError(f"{what}: decision {number}{_about(row)} {fault}; write it again (`hal lock`)")
        _check_one(rows.setdefault(key_of(row), row), row, what)
    return tuple(rows.values())


def _file_fault(data: Any) -> str:
    if not isinstance(data, dict) or "format" not in data:
        return "it must hold an object with a format and decisions"
    if data["format"] != FORMAT:
        return f"format {data['format']}, and this hal reads {FORMAT}"
    return "" if isinstance(data.get("decisions"), list) else "its decisions must be a list"


def _fault(row: Any) -> str:
    """What keeps a decision from being a receipt."""
    if not isinstance(row, dict):
        return f"must be an object, and is {row!r}"
    missing = [name for name in (*_TEXTS, *_OBJECTS) if name not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [n for n in _TEXTS if not isinstance(row[n], str)] + [n for n in _OBJECTS if not isinstance(row[n], dict)]
    if wrong:
        return f"has {wrong[0]} {row[wrong[0]]!r}: it must be {'a text' if wrong[0] in _TEXTS else 'an object'}"
    for phase, found in row["kernels"].items():
        if not (isinstance(found, dict) and isinstance(found.get("kernel"), str)):
            return f"does not name the kernel for {phase}"
        if not isinstance(found.get("versions"), dict):
            return f"does not say the versions for {phase}"
    return ""


def _about(row: Any) -> str:
    named = isinstance(row, dict) and all(isinstance(row.get(n), str) for n in ("op", "platform", "arch"))
    return f" ({row['platform']}:{row['arch']} {row['op']})" if named else ""


def where(row: Mapping[str, Any]) -> str:
    """A decision in words: the device, the op, and what was asked for beyond false, none and auto."""
    asked = {k: v for k, v in row["request"].items() if v not in (None, False, 0.0, AUTO, [None, None])}
    fields = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in asked.items())
    return f"{row['platform']}:{row['arch']} {row['op']} {fields}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What is another in two decisions, a line each."""
    lines = []
    for phase in sorted({*a["kernels"], *b["kernels"]}):
        one, two = a["kernels"].get(phase, {}), b["kernels"].get(phase, {})
        if one.get("kernel") != two.get("kernel"):
            lines.append(f"{phase}: {one.get('kernel')} -> {two.get('kernel')}")
        versions, others = one.get("versions", {}), two.get("versions", {})
        lines += [
            f"{phase}: {k} {versions.get(k)} -> {others.get(k)}"
            for k in sorted({*versions, *others})
            if versions.get(k) != others.get(k)
        ]
    lines += [
        f"{f}: {a['fields'].get(f)} -> {b['fields'].get(f)}"
        for f in sorted({*a["fields"], *b["fields"]})
        if a["fields"].get(f) != b["fields"].get(f)
    ]
    if not lines and a["reasons_digest"] != b["reasons_digest"]:
        lines.append("the same kernels, for other reasons")
    return lines
