"""Receipts, lock files and diffs: decisions that can be kept, repeated and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal._eligibility import Circumstances
from hal._ledger import identity
from hal._lock_file import differences, key_of, read_lock, where, write_lock
from hal.errors import LockError, RankMismatchError
from hal_ops import AUTO, Request, record

if TYPE_CHECKING:
    from hal._selection import Selection

__all__ = ["assert_same_decisions", "diff_locks", "read_lock", "receipt", "write_lock"]


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


def locked(request: Request, around: Circumstances) -> Locked:
    """What ``HAL_LOCK`` holds for this request on this kind of device.

    Raises:
        LockError: the decision depends on a device, library or kernel that is not as it was; every difference is named.
            Or what the file holds is not what this request needs.
    """
    path = around.settings["lock"]
    if path is None:
        return Locked()
    here = (request.digest(), around.device.platform, around.device.arch.name)
    for row in read_lock(path):
        if key_of(row) == here:
            _check_whole(row, path, request, around)
            _check_unchanged(row, path, around)
            return Locked({p: k["kernel"] for p, k in row["kernels"].items()}, row["fields"])
    return Locked(notes=(f"the lock file {path} holds no decision for this request: it was made afresh",))


def _check_whole(row: Mapping[str, Any], path: Path, request: Request, around: Circumstances) -> None:
    """A decision says everything that the request leaves open, and nothing else."""
    phases = getattr(request, "phases", None) or around.registry.op(request.op).phases
    free, kernels, fields = request.open_fields(), row["kernels"], row["fields"]
    faults = [
        *(f"it has no kernel for {phase}" for phase in phases if phase not in kernels),
        *(f"it has a kernel for {phase}, which the request does not have" for phase in kernels if phase not in phases),
        *(f"it does not say {name}, which the request leaves open" for name in free if fields.get(name, AUTO) == AUTO),
        *(f"it sets {name}, which the request does not leave open" for name in fields if name not in free),
    ]
    if not faults:
        try:
            request.replace(**fields)
        except (TypeError, ValueError) as error:
            faults = [str(error)]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise LockError(
            f"lock file {path} is damaged: of the decision for {where(row)}\n{listed}\n"
            "write it again (`hal lock`), or unset HAL_LOCK",
            differences=tuple(faults),
        )


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
    before = {key_of(r): r for r in read_lock(Path(old))}
    after = {key_of(r): r for r in read_lock(Path(new))}
    lines = []
    for key in sorted({*before, *after}):
        what = where(before.get(key) or after[key])
        if key not in after or key not in before:
            lines.append(f"{where}: {'only in ' + str(old) if key in before else 'only in ' + str(new)}")
        else:
            lines += [f"{what}: {line}" for line in differences(before[key], after[key])]
    return lines


def assert_same_decisions(receipts: Iterable[Mapping[str, Any]], all_gather: Callable[[Any], list[Any]]) -> None:
    """Check that every rank of a job decided the same. Call it once on every rank, after the handles are made.

    ``all_gather`` takes this rank's object and returns those of all ranks, in rank order (with torch:
    ``lambda x: (out := [None] * dist.get_world_size(), dist.all_gather_object(out, x))[0]``).

    Raises:
        RankMismatchError: on every rank alike, naming the ranks and what differs from rank 0.
    """
    first, *others = map(_by_request, all_gather([dict(r) for r in receipts]))
    found = [
        line
        for rank, theirs in enumerate(others, start=1)
        for request in sorted({*first, *theirs})
        for line in _unlike(request, first.get(request, {}), theirs.get(request, {}), rank)
    ]
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise RankMismatchError(f"the ranks of this job decided differently:\n{listed}", differences=tuple(found))


Receipt = Mapping[str, Any]


def _by_request(receipts: Iterable[Receipt]) -> dict[str, dict[str, Receipt]]:
    """Request to its decisions: one may be decided for several devices, or in several ways, if one was forced."""
    found: dict[str, dict[str, Receipt]] = {}
    for receipt in receipts:
        found.setdefault(receipt["request_digest"], {})[receipt["digest"]] = receipt
    return found


def _unlike(request: str, first: Mapping[str, Receipt], theirs: Mapping[str, Receipt], rank: int) -> Iterator[str]:
    """What a rank decided otherwise than rank 0, or only one of them did."""
    if not first or not theirs:
        yield f"rank {rank}: request {request} was decided on {'rank 0' if first else f'rank {rank}'} only"
        return
    mine = [r for digest, r in first.items() if digest not in theirs]
    others = [r for digest, r in theirs.items() if digest not in first]
    for one in mine:
        alike = [r for r in others if key_of(r) == key_of(one)] or others
        if alike:
            others.remove(alike[0])
            lines = differences(one, alike[0]) or ["another device or request"]
            yield from (f"rank {rank} against rank 0: {line}" for line in lines)
        else:
            yield f"rank {rank}: only rank 0 decided {_kernels(one)} for {where(one)}"
    yield from (f"rank {rank}: rank 0 did not decide {_kernels(r)} for {where(r)}" for r in others)


def _kernels(receipt: Receipt) -> str:
    return ", ".join(k["kernel"] for k in receipt["kernels"].values())
