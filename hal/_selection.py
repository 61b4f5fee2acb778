"""Selection: from a request to one kernel a phase, with the reasons of every candidate.

What may steer the choice, highest first, is listed in :data:`PRECEDENCE`. A forced choice goes through the same checks
as any other, and is never replaced.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal import _devices, _plugins, _settings
from hal._choice import Candidate, PhaseChoice
from hal._device import Device
from hal._eligibility import Circumstances, elsewhere, errata_for, why_not
from hal._failures import Failures
from hal._forced import Forced, check_argument, check_names, forced_kernels
from hal._joint import Job, decide_open_fields
from hal._kernel import Kernel
from hal._ledger import Ledger
from hal._libraries import as_now
from hal._reason import Reason
from hal._registry import Registry
from hal.errors import NoKernelError, UnknownKernelError
from hal_ops import Op, Request, record

if TYPE_CHECKING:
    from hal._lock import Locked
    from hal._measurements import Measurements

__all__ = ["Candidate", "PRECEDENCE", "PhaseChoice", "Selection", "select"]

PRECEDENCE = (
    "call argument",
    "context manager",
    "lock file",
    "HAL_* variable",
    "config file",
    "measurement",
    "priority band",
    "name",
)

log = logging.getLogger("hal")
failures = Failures()
"""Kernels whose code could not be imported or constructed in this process, with the reasons."""


@record(frozen=True)
class Selection:
    """The outcome of a request: a kernel a phase, and why not each of the others.

    It can be pickled. What is read from a pickle answers all the same, without the plugins that it was decided with; only
    ``around``, which is of the process that decided, is None, and kernels come without their code (``check``).
    """

    op: Op
    request: Request
    """With every field that was left open decided."""
    asked: Request
    device: Device
    choices: Mapping[str, PhaseChoice]
    around: Circumstances = dataclasses.field(repr=False)
    joint: tuple[str, ...] = ()
    """What was decided jointly for all phases, such as ``page_size 16``."""
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every phase has a kernel."""
        return all(choice.kernel is not None for choice in self.choices.values())

    def kernels(self) -> dict[str, str | None]:
        """Phase to the chosen kernel's name, or None."""
        return {p: None if c.kernel is None else c.kernel.name for p, c in self.choices.items()}

    def explain(self) -> str:
        """The decision for people: the device, the request, each candidate with its reasons, near misses, steering."""
        from hal._explain import render

        return render(self)

    def near_misses(self) -> tuple[Any, ...]:
        """The smallest changes that would admit refused kernels, best first; see :class:`hal.NearMiss`."""
        from hal._near import near_misses

        return near_misses(self)

    def as_dict(self) -> dict[str, Any]:
        """The same facts as data, JSON-ready."""
        from hal._explain import as_dict

        return as_dict(self)

    def receipt(self) -> dict[str, Any]:
        """Kernel, device, versions and a digest of the reasons; what lock files are made of."""
        from hal._lock import receipt

        return receipt(self)

    def __str__(self) -> str:
        return self.explain()

    def __reduce__(self) -> tuple[Any, ...]:
        from hal._pickled import reduced

        return reduced(self)


def select(request: Request, *, device: Any = None, kernel: Any = None) -> Selection:
    """Choose a kernel for every phase of a request. Imports no kernel and touches no device.

    ``device`` is anything :func:`hal.device` takes; ``kernel`` forces a kernel or library by name, or one a phase by a
    mapping. A selection that found nothing for a phase is returned too: look at ``complete``.

    Raises:
        UnknownKernelError: something asks for a kernel that does not exist or serves another op, or ``kernel`` for one of
            a phase that the request does not have.
        LockError: the lock file holds a decision for this request that cannot be repeated.
    """
    return select_together([request], device=device, kernel=kernel)[0]


def select_together(requests: Sequence[Request], *, device: Any = None, kernel: Any = None) -> tuple[Selection, ...]:
    """Choose for several requests at once, such as the layers of a model that share one pool of pages.

    Fields left open (``page_size``, ``kv_layout``) get one value for all of them: the one with which the best kernels
    can serve.
    """
    where = _devices.meant(device)
    platform = None if where is None else where.platform
    try:
        registry = _plugins.registry({request.op for request in requests}, platform)
        if where is not None and where.platform in registry.platforms:
            device = where  # and not found anew, unless its plugin turned out to be broken
        return _decided(requests, device, kernel, registry)
    except UnknownKernelError:
        everything = _plugins.registry()  # a name may be of another op, or of a kernel for other devices
    return _decided(requests, device, kernel, everything)


def _decided(requests: Sequence[Request], device: Any, kernel: Any, registry: Registry) -> tuple[Selection, ...]:
    settings = _settings.current()
    check_names(settings, registry)
    ledger = Ledger(settings.cache_dir() / "ledger.json")
    around = Circumstances(_devices.device(device), registry, settings, ledger, failures)
    _check_argument(requests, kernel, registry)
    jobs = [_job(request, kernel, around) for request in requests]
    values = decide_open_fields(jobs, around)
    return tuple(_outcome(job, request, values, around) for job, request in zip(jobs, requests, strict=True))


def _check_argument(requests: Sequence[Request], kernel: Any, registry: Registry) -> None:
    """One argument speaks to all requests together: a phase that one of them has is asked for."""
    if kernel is None:
        return
    for op in {registry.op(request.op) for request in requests}:
        asked = {phase for r in requests if registry.op(r.op) is op for phase in _phases(r, op)}
        check_argument(op, asked, kernel, registry)


def _phases(request: Request, op: Op) -> tuple[str, ...]:
    wanted = getattr(request, "phases", None) or op.phases
    return tuple(p for p in op.phases if p in wanted)


def _job(request: Request, kernel: Any, around: Circumstances) -> Job:
    op = around.registry.op(request.op)
    phases = _phases(request, op)
    lock = _locked(request, around)
    resolved, notes = _resolved(request, around.device)
    resolved = resolved.replace(**lock.fields) if lock is not None and lock.fields else resolved
    notes += () if lock is None else lock.notes
    return Job(op, resolved, phases, forced_kernels(op, phases, kernel, lock, around), notes)


def _resolved(request: Request, device: Device) -> tuple[Request, tuple[str, ...]]:
    """The request exact for the device; what the device cannot make exact stays, and no kernel will admit it."""
    try:
        return request.resolved(device.capabilities), ()
    except ValueError as error:
        return request, (str(error),)


def _locked(request: Request, around: Circumstances) -> Locked | None:
    """What the lock file says; nothing is imported where there is none."""
    if around.settings["lock"] is None:
        return None
    from hal._lock import locked

    return locked(request, around)


def _measurements(around: Circumstances) -> Measurements | None:
    """The measurements of this machine, if there are any and they may decide."""
    path = around.settings.cache_dir() / "measurements.json"
    if around.device.simulated or not path.exists():
        return None
    from hal._measurements import Measurements

    return Measurements(path)


def _outcome(job: Job, asked: Request, values: Mapping[str, Any], around: Circumstances) -> Selection:
    decided = job.with_values(values)
    choices = {p: _choose(job.op, p, decided, job.forced.get(p), around) for p in job.phases}
    joint = tuple(f"{f} {getattr(decided, f)}" for f in job.open_fields())
    return Selection(job.op, decided, asked, around.device, choices, around, joint, job.notes)


def require(selection: Selection) -> Selection:
    """The selection itself, if every phase has a kernel.

    Raises:
        NoKernelError: with the selection and all of its text.
    """
    if selection.complete:
        return selection
    from hal._explain import render_failure

    raise NoKernelError(render_failure(selection), selection=selection)


def _choose(op: Op, phase: str, request: Request, forced: Forced | None, around: Circumstances) -> PhaseChoice:
    kernels = around.registry.candidates(op.name, phase, around.device)
    here = {k: why_not(k, request, around) for k in kernels if not elsewhere(k, around)}
    eligible = [k for k, reasons in here.items() if not reasons]
    times = _measurements(around)
    order, measured = (eligible, False) if times is None else times.order(eligible, request, around)
    pool = [k for k in order if forced is None or k.answers_to(forced.name)]
    chosen = pool[0] if pool else None

    def candidate(kernel: Kernel, reasons: list[Reason]) -> Candidate:
        return _candidate(kernel, kernel is chosen, reasons, forced, request, around, times)

    judged = {k: candidate(k, reasons) for k, reasons in here.items()}

    def show() -> tuple[Candidate, ...]:
        whole = around.registry.whole((op.name,)).candidates(op.name, phase)
        every = {k.name: k for k in (*whole, *kernels)}.values()
        shown = sorted(every, key=lambda k: _rank(k, chosen, order, forced, around))
        return tuple(judged[k] if k in judged else candidate(k, why_not(k, request, around)) for k in shown)

    return PhaseChoice(phase, chosen, forced, measured and forced is None, as_now(show))


def _rank(
    kernel: Kernel, chosen: Kernel | None, order: list[Kernel], forced: Forced | None, around: Circumstances
) -> tuple[Any, ...]:
    """Order of showing: the chosen one, those that were asked for, those that could serve, those for this vendor, others."""
    asked = forced is not None and kernel.answers_to(forced.name)
    place = order.index(kernel) if kernel in order else len(order)
    other = elsewhere(kernel, around)
    return (kernel is not chosen, not asked, place, other, -kernel.priority_on(around.device), kernel.name)


def _candidate(
    kernel: Kernel,
    chosen: bool,
    why: list[Reason],
    forced: Forced | None,
    request: Request,
    around: Circumstances,
    times: Measurements | None,
) -> Candidate:
    if forced is not None and not kernel.answers_to(forced.name):
        why = [*why, Reason("not_forced", f"{forced.source} asks for {forced.name}", "setting")]
    status = "chosen" if chosen else "refused" if why else "eligible"
    row = around.ledger_row(kernel, request)
    time = None if times is None else times.get(kernel, request, around)
    evidence = f"{row.status} here {row.date}" if row else kernel.evidence_for(around.device.arch.name, request)
    notes = [
        f"known to be slow: {e.summary} [{e.id}]" for e in errata_for(kernel, request, around) if e.severity == "slow"
    ]
    if copies := kernel.copies_for(request):
        notes.append(f"copies {copies}")
    return Candidate(kernel, status, tuple(why), evidence, time, tuple(notes), kernel.priority_on(around.device))
