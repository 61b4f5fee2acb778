"""Verifying: the corners of what kernels claim, run on this machine, and the ledger's rows about them."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hal import _devices, _plugins, _settings
from hal._device import Device
from hal._eligibility import Circumstances, why_not
from hal._kernel import Kernel
from hal._ledger import Ledger, Row, identity
from hal._reason import Reason
from hal._registry import Registry
from hal.errors import DeviceError, HalError
from hal.testing._check import Result
from hal.testing._corners import corners, request_id
from hal.testing._isolated import Isolated
from hal_ops import Request

__all__ = ["circumstances", "refusals", "verify"]

log = logging.getLogger("hal")

QUICK = 8
"""Corners a kernel in a quick run."""
NOT_FOUND_OUT = ("quarantined", "unverified", "not_forced", "not_strict")
"""Codes of refusals that a verification may overturn, or that do not speak about the kernel's work."""


def verify(
    *,
    op: str | None = None,
    kernels: Sequence[str] | str = (),
    device: Any = None,
    requests: Sequence[Request] = (),
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
    isolate: bool | None = None,
) -> list[Row]:
    """Run what kernels claim on this machine, and record in the ledger what is verified and what failed.

    A failed row quarantines its kernel for that corner, on such a device, with these versions; ``HAL_VERIFY=require``
    admits verified ones only. Requests that failed before are tried again. A row is recorded a corner: it is failed if
    any request in it failed. What cannot be tried (memory ran out, the check itself failed) is told to ``progress``, is
    logged, and leaves no row.

    Args:
        op, kernels: only this op's kernels, only these kernels or libraries. Default: all that the device can run.
        device: anything :func:`hal.device` takes. requests: these in place of the generated corners.
        quick: fewer corners a kernel. A quick run does not lift a quarantine.
        progress: called with a line of text as the work goes on.
        isolate: check in a process of its own, so that a crash is a failed row and not the end; default: on
            accelerators.

    Returns:
        The rows that were recorded.

    Raises:
        DeviceError: the device is simulated or unusable.
        HalError: no kernel that was asked for can run here; the text says why.
        UnknownKernelError, UnknownOpError: a name that is none.
    """
    where = _devices.device(device)
    around = circumstances(where)
    say = progress or _silent
    names = (kernels,) if isinstance(kernels, str) else tuple(kernels)
    recorded: list[Row] = []
    with Isolated(enabled=where.torch_type != "cpu" if isolate is None else isolate) as process:
        for kernel, todo in _jobs(around, op, names, requests, quick).items():
            results = list(_run(kernel, todo, where, process, say))
            rows = _rows(kernel, where, results, around.ledger, quick)
            around.ledger.record(rows)
            recorded += rows
    return recorded


def circumstances(device: Device) -> Circumstances:
    """What decides on this device, with nothing held against kernels that failed earlier in this process.

    Raises:
        DeviceError: nothing can run on the device.
    """
    if device.simulated or device.unusable:
        why = "is simulated" if device.simulated else f"cannot be used: {device.unusable}"
        raise DeviceError(f"{device} {why}; kernels are verified by running them")
    settings = _settings.current()
    return Circumstances(device, _plugins.registry(), settings, Ledger(settings.cache_dir() / "ledger.json"))


def refusals(kernel: Kernel, request: Request, around: Circumstances) -> list[Reason]:
    """Why a kernel cannot be tried here with a request."""
    return [r for r in why_not(kernel, request, around) if r.code not in NOT_FOUND_OUT]


def _silent(text: str) -> None:
    return None


def _jobs(
    around: Circumstances, op: str | None, names: Sequence[str], requests: Sequence[Request], quick: bool
) -> dict[Kernel, list[Request]]:
    """What to run of each kernel; kernels with nothing to run are not in it."""
    asked = _named(around.registry, None if op is None else around.registry.op(op).name, names)
    found = {kernel: _requests(kernel, around, requests, quick) for kernel in asked}
    jobs = {kernel: todo for kernel, todo in found.items() if todo}
    if (names or op) and not jobs:
        listed = "\n".join(f"  {k.name}: {_why_nothing(k, around, requests)}" for k in asked)
        raise HalError(f"none of the kernels asked for can run on {around.device}:\n{listed}")
    return jobs


def _named(registry: Registry, op: str | None, names: Sequence[str]) -> list[Kernel]:
    for name in names:
        registry.check_known(name, "hal.testing.verify")
    found = (k for k in registry.kernels.values() if op in (None, k.op))
    return sorted((k for k in found if not names or any(map(k.answers_to, names))), key=lambda k: k.name)


def _why_nothing(kernel: Kernel, around: Circumstances, requests: Sequence[Request]) -> str:
    mine = [r for r in requests if r.op == kernel.op] or corners(kernel, op=around.registry.op(kernel.op), limit=1)
    return "; ".join(map(str, refusals(kernel, mine[0], around))) or "the requests are for other phases"


def _requests(kernel: Kernel, around: Circumstances, given: Sequence[Request], quick: bool) -> list[Request]:
    op = around.registry.op(kernel.op)
    if given:
        todo = [r for r in given if r.op == kernel.op and kernel.phase in (getattr(r, "phases", None) or op.phases)]
    else:
        todo = corners(kernel, op=op, device=around.device, limit=QUICK if quick else None)
        todo += [] if quick else _failed_before(kernel, around)
    return [r for r in dict.fromkeys(todo) if not refusals(kernel, r, around)]


def _failed_before(kernel: Kernel, around: Circumstances) -> list[Request]:
    make, key = around.registry.op(kernel.op).request, identity(kernel, around.device)
    rows = [r for r in around.ledger.rows() if r.kernel == kernel.name and r.status == "failed" and r.key == key]
    return [make(**{n: _tuples(v) for n, v in row.request.items()}) for row in rows if row.request]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _run(
    kernel: Kernel, requests: Iterable[Request], device: Device, process: Isolated, say: Callable[[str], None]
) -> Iterator[Result]:
    todo = list(requests)
    for number, request in enumerate(todo, 1):
        say(f"{kernel.name} {number}/{len(todo)}: {request_id(request)}")
        result = process.check(kernel, request, device)
        if not result.ok:
            say(f"{kernel.name} {result.status}: {request_id(request)}: {result.detail.splitlines()[0]}")
        if result.status == "untested":
            log.warning("%s", result)
        yield result


def _rows(kernel: Kernel, device: Device, results: list[Result], ledger: Ledger, quick: bool) -> list[Row]:
    """A row a corner; the worst of its results counts."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.status != "untested":
            groups.setdefault(json.dumps(result.request.corner(kernel.phase), sort_keys=True), []).append(result)
    key, today = identity(kernel, device), dt.date.today().isoformat()
    mine = [r for r in ledger.rows() if r.kernel == kernel.name and r.key == key]
    quarantined = [r.corner for r in mine if r.status == "failed"]
    rows = []
    for group in groups.values():
        worst = min(group, key=lambda r: r.ok)
        corner = worst.request.corner(kernel.phase)
        if not (worst.ok and quick and corner in quarantined):
            detail = worst.detail if worst.ok else f"{request_id(worst.request)}: {worst.detail}"
            rows.append(Row(kernel.name, key, corner, worst.status, detail, today, worst.request.as_dict()))
    return rows
