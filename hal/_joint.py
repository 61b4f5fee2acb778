"""Joint choice: fields left open get the values with which all phases of all requests are served best."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hal._eligibility import Circumstances, eligible, elsewhere
from hal._forced import Forced
from hal_ops import AUTO, Op, Request, record

__all__ = ["Job", "decide_open_fields"]


@record(frozen=True)
class Job:
    """One request on its way: exact for the device, with its phases and what forces them."""

    op: Op
    request: Request
    phases: tuple[str, ...]
    forced: Mapping[str, Forced]
    notes: tuple[str, ...]

    def open_fields(self) -> tuple[str, ...]:
        rules = self.request.rules()
        return tuple(f for f in self.request.open_fields() if any(rules[f].applies(p) for p in self.phases))

    def with_values(self, values: Mapping[str, Any]) -> Request:
        """The request with its open fields set; those that no phase of it looks at get their first preference."""
        rules = self.request.rules()
        changes = {f: values.get(f, rules[f].preferred[0]) for f in self.request.open_fields()}
        return self.request.replace(**changes) if changes else self.request


def decide_open_fields(jobs: Sequence[Job], around: Circumstances) -> dict[str, Any]:
    """Values for the fields left open with which all phases of all jobs together get their best kernels."""
    fields = tuple(dict.fromkeys(f for job in jobs for f in job.open_fields()))
    if not fields:
        return {}
    ceiling = _score(jobs, None, around)
    best: dict[str, Any] = {}
    best_score = (-1, -1)
    for values in itertools.product(*(_values(f, jobs, around) for f in fields)):
        candidate = dict(zip(fields, values, strict=True))
        score = _score(jobs, candidate, around)
        if score > best_score:
            best, best_score = candidate, score
        if score >= ceiling:
            break
    return best


def _values(field: str, jobs: Sequence[Job], around: Circumstances) -> tuple[Any, ...]:
    """Preferred values first, then whatever the candidates' declarations name."""
    preferred: list[Any] = []
    declared: list[Any] = []
    for job in (j for j in jobs if field in j.open_fields()):
        preferred += job.request.rules()[field].preferred
        if job.request.rules()[field].closed:
            continue
        kernels = [k for p in job.phases for k in around.registry.candidates(job.op.name, p) if field in k.fields]
        mine = [k for k in kernels if not elsewhere(k, around)]
        declared += [v for k in mine for v in k.fields[field].corners(job.request) if v != AUTO]
    return tuple(dict.fromkeys((*preferred, *declared)))


def _score(jobs: Sequence[Job], values: Mapping[str, Any] | None, around: Circumstances) -> tuple[int, int]:
    """How good the best kernels are: phases served first, then the sum of their priorities. None leaves fields open."""
    served = 0
    total = 0
    for job in jobs:
        request = job.request if values is None else job.with_values(values)
        best = [_best_priority(job.op, p, request, job.forced.get(p), around) for p in job.phases]
        served += sum(b is not None for b in best)
        total += sum(b for b in best if b is not None)
    return served, total


def _best_priority(op: Op, phase: str, request: Request, forced: Forced | None, around: Circumstances) -> int | None:
    for kernel in around.registry.candidates(op.name, phase, around.device):
        if (forced is None or kernel.answers_to(forced.name)) and eligible(kernel, request, around):
            return kernel.priority_on(around.device)
    return None
