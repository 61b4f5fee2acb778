"""Receipts, lock files and diffs: decisions that can be kept, repeated and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal._eligibility import Circumstances
from hal._ledger import identity, write_json
from hal.errors import LockError, RankMismatchError
from hal_ops import AUTO, Request, record

if TYPE_CHECKING:
    from hal._selection import Selection

__all__ = ["assert_same_decisions", "diff_locks", "receipt", "write_lock"]

FORMAT = 1


@record(frozen=True)
class Locked:
    """What the lock file says of a request."""

    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def receipt(selection: Selection) -> dict[str, Any]:
    """One decision, JSON-ready: request, device, kernels with the versions they depend on, and a digest of it all.

    ``reasons_digest`` changes when any candidate's reasons do; ``digest`` when the decision itself does.
    """
    from hal import __version__

    kernels = {}
    for phase, choice in selection.choices.items():
        if choice.kernel is not None:
            kernels[phase] = {"kernel": choice.kernel.name, "versions": identity(choice.kernel, selection.device)}
    fields = {f: getattr(selection.request, f) for f in selection.asked.open_fields()}
    decision = {
        "op": selection.op.name,
        "request": selection.asked.as_dict(),
        "request_digest": selection.asked.digest(),
        "platform": selection.device.platform,
        "arch": selection.device.arch.name,
        "fields": fields,
        "kernels": kernels,
    }
    reasons = [c.as_dict() for choice in selection.choices.values() for c in choice.candidates]
    return {**decision, "digest": _digest(decision), "reasons_digest": _digest(reasons), "hal": __version__}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_lock(path: str | os.PathLike[str], receipts: Iterable[Mapping[str, Any]]) -> None:
    """Write a lock file of receipts, sorted; ``HAL_LOCK=path`` then repeats these decisions or fails."""
    rows = {(r["request_digest"], r["platform"], r["arch"]): dict(r) for r in receipts}
    write_json(Path(path), {"format": FORMAT, "decisions": [rows[key] for key in sorted(rows)]})


def read_lock(path: Path) -> tuple[dict[str, Any], ...]:
    """The receipts of a lock file.

    Raises:
        LockError: the file is missing or damaged.
    """
    try:
        return _read(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise LockError(f"lock file {path} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _read(path: Path, stamp: int) -> tuple[dict[str, Any], ...]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, and this hal reads {FORMAT}")
        return tuple(data["decisions"])
    except (ValueError, KeyError, TypeError) as error:
        raise LockError(f"lock file {path} is damaged: {error}") from error


def locked(request: Request, around: Circumstances) -> Locked:
    """What ``HAL_LOCK`` holds for this request on this kind of device.

    Raises:
        LockError: the decision depends on a device, library or kernel that is not as it was; every difference is named.
    """
    path = around.settings["lock"]
    if path is None:
        return Locked()
    here = (request.digest(), around.device.platform, around.device.arch.name)
    for row in read_lock(path):
        if (row["request_digest"], row["platform"], row["arch"]) == here:
            _check_unchanged(row, path, around)
            return Locked({p: k["kernel"] for p, k in row["kernels"].items()}, row["fields"])
    return Locked(notes=(f"the lock file {path} holds no decision for this request: it was made afresh",))


def _check_unchanged(row: Mapping[str, Any], path: Path, around: Circumstances) -> None:
    changed = []
    for phase, locked_kernel in row["kernels"].items():
        name = locked_kernel["kernel"]
        kernel = around.registry.kernels.get(name) or around.registry.whole((row["op"],)).kernels.get(name)
        if kernel is None:
            changed.append(f"{phase}: kernel {name} is not registered any more")
            continue
        now, then = identity(kernel, around.device), locked_kernel["versions"]
        changed += [
            f"{phase}: {k} was {then.get(k, 'absent')}, is {now.get(k, 'absent')}"
            for k in sorted({*now, *then})
            if now.get(k) != then.get(k)
        ]
    if changed:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(changed))
        raise LockError(
            f"the decision in lock file {path} was made under other circumstances:\n{lines}\n"
            "write it again (`hal lock`), or unset HAL_LOCK",
            differences=tuple(changed),
        )


def diff_locks(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> list[str]:
    """What changed between two lock files, a line each; empty when nothing did."""
    before = {(r["request_digest"], r["platform"], r["arch"]): r for r in read_lock(Path(old))}
    after = {(r["request_digest"], r["platform"], r["arch"]): r for r in read_lock(Path(new))}
    lines = []
    for key in sorted({*before, *after}):
        where = _where(before.get(key) or after[key])
        if key not in after or key not in before:
            lines.append(f"{where}: {'only in ' + str(old) if key in before else 'only in ' + str(new)}")
        else:
            lines += [f"{where}: {line}" for line in _differences(before[key], after[key])]
    return lines


def _where(row: Mapping[str, Any]) -> str:
    """A decision in words: the device, the op, and what was asked for beyond false, none and auto."""
    asked = {k: v for k, v in row["request"].items() if v not in (None, False, 0.0, AUTO, [None, None])}
    fields = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in asked.items())
    return f"{row['platform']}:{row['arch']} {row['op']} {fields}"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
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


def assert_same_decisions(receipts: Iterable[Mapping[str, Any]], all_gather: Callable[[Any], list[Any]]) -> None:
    """Check that every rank of a job decided the same. Call it once on every rank, after the handles are made.

    ``all_gather`` takes this rank's object and returns those of all ranks, in rank order (with torch:
    ``lambda x: (out := [None] * dist.get_world_size(), dist.all_gather_object(out, x))[0]``).

    Raises:
        RankMismatchError: on every rank alike, naming the ranks and what differs from rank 0.
    """
    mine = {r["request_digest"]: dict(r) for r in receipts}
    ranks = all_gather(mine)
    differences = []
    for rank, theirs in enumerate(ranks[1:], start=1):
        for key in sorted({*ranks[0], *theirs}):
            if key not in theirs or key not in ranks[0]:
                differences.append(
                    f"rank {rank}: request {key} was decided on {'rank 0' if key in ranks[0] else f'rank {rank}'} only"
                )
            elif ranks[0][key]["digest"] != theirs[key]["digest"]:
                lines = _differences(ranks[0][key], theirs[key]) or ["another device or request"]
                differences += [f"rank {rank} against rank 0: {line}" for line in lines]
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise RankMismatchError(f"the ranks of this job decided differently:\n{listed}", differences=tuple(differences))
