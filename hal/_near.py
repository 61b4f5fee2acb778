"""Near misses: the smallest change of request or installation that would admit a refused kernel."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hal._eligibility import Circumstances, why_not
from hal._kernel import Kernel
from hal._reason import Reason
from hal_ops import Request, record

if TYPE_CHECKING:
    from hal._selection import Selection

__all__ = ["NearMiss", "near_misses"]

_INSTALL = ("not_installed", "version_too_old", "version_too_new", "runtime_too_old", "driver_too_old")
_SETTING = ("disabled_by_env", "not_forced", "not_strict", "unverified", "quarantined")


@record(frozen=True)
class NearMiss:
    """A change and the kernels that it would admit.

    ``changes`` are (field, value) pairs; ``install`` says what to install or renew: libraries, runtime, driver;
    ``first`` is whether the best of the kernels would then be chosen.
    """

    kernels: tuple[str, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    install: tuple[str, ...] = ()
    first: bool = False

    def text(self) -> str:
        """One line, such as ``without sinks: fa3.prefill, fa3.decode would be chosen``."""
        steps = [_change(field, value) for field, value in self.changes] + list(self.install)
        then = " would be chosen" if self.first else " would do"
        return f"{', '.join(steps)}: {', '.join(self.kernels)}{then}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "kernels": list(self.kernels),
            "changes": {f: list(v) if isinstance(v, tuple) else v for f, v in self.changes},
            "install": list(self.install),
            "first": self.first,
        }


def near_misses(selection: Selection) -> tuple[NearMiss, ...]:
    """Near misses of all phases: fewest changes first, then the best kernels, one a phase.

    Other hardware is no near miss, and neither is a request that asks for more: nobody wants sinks for a kernel's sake.
    What the request left open is no change either, since it is decided anew with what is installed then.
    """
    found: dict[tuple[Any, ...], list[tuple[Kernel, bool]]] = {}
    for choice in selection.choices.values():
        chosen = -1 if choice.kernel is None else choice.kernel.priority_on(selection.device)
        for candidate in choice.candidates:
            kernel = candidate.kernel
            if candidate.status == "refused" and candidate.priority >= chosen:
                change = _smallest_change(kernel, candidate.reasons, selection)
                if change is not None:
                    found.setdefault(change, []).append((kernel, candidate.priority > chosen))

    def rank(item: tuple[tuple[Any, ...], list[tuple[Kernel, bool]]]) -> tuple[int, int]:
        (changes, install), kernels = item
        return len(changes) + len(install), -max(k.priority_on(selection.device) for k, _ in kernels)

    ranked = sorted(found.items(), key=rank)
    best = {change: _best(change, found, selection) for change, _ in ranked}
    return tuple(
        NearMiss(tuple(k.name for k, _ in kernels), changes, install, kernels[0][1])
        for (changes, install), kernels in best.items()
        if kernels
    )


def _best(
    change: tuple[Any, ...], found: Mapping[tuple[Any, ...], list[tuple[Kernel, bool]]], selection: Selection
) -> list[tuple[Kernel, bool]]:
    """The best kernel of each phase, unless part of the change brings a better one; if some would be chosen, those."""
    changes, install = map(set, change)
    within = [mine for (fields, needed), mine in found.items() if changes >= {*fields} and install >= {*needed}]
    order = sorted(itertools.chain(*within), key=lambda item: (-item[0].priority_on(selection.device), item[0].name))
    phases: dict[str, tuple[Kernel, bool]] = {}
    for kernel, first in order:
        phases.setdefault(kernel.phase, (kernel, first))
    mine = [phases[phase] for phase in selection.choices if phase in phases and phases[phase] in found[change]]
    return [(k, first) for k, first in mine if first] or mine


def _smallest_change(
    kernel: Kernel, reasons: tuple[Reason, ...], selection: Selection
) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]] | None:
    request, around = selection.request, selection.around
    rules, free = request.rules(), selection.asked.open_fields()
    if any(r.code in _SETTING or (r.field not in rules and not _is_renewed(r)) for r in reasons):
        return None
    changed = _permitted(kernel, request, around, free) or _fitted(kernel, request, around)
    if changed is None:
        return None
    left = why_not(kernel, changed, around)
    install = tuple(dict.fromkeys(_renewal(r, around) for r in left if _is_renewed(r)))
    if any(changed.turns_on(f) and not request.turns_on(f) for f in rules):
        return None
    moved = (f for f in rules if f not in free and getattr(changed, f) != getattr(request, f))
    changes = tuple(
        (f, getattr(changed, f))
        for f in moved
        if rules[f].required or not changed.is_neutral(f) or not request.is_neutral(f)
    )
    changes += tuple((f, True) for f in _permissions(request) if getattr(changed, f))
    return (changes, install) if changes or install else None


def _permissions(request: Request) -> list[str]:
    """Fields that permit something, and ask for nothing, as far as they are not set."""
    members = {f.name for f in dataclasses.fields(request)}
    return [name for name in request.derived if name in members and getattr(request, name) is False]


def _permitted(kernel: Kernel, request: Request, around: Circumstances, free: Iterable[str]) -> Request | None:
    """The request with a permission, where the kernel is refused for want of that, and of nothing else that was asked."""
    asked = [f for f in request.rules() if f not in free]
    if any(r.field in asked for r in why_not(kernel, request, around)):
        for name in _permissions(request):
            fitted = _fitted(kernel, request.replace(**{name: True}), around)
            if fitted is not None and all(getattr(fitted, f) == getattr(request, f) for f in asked):
                return fitted
    return None


def _is_renewed(reason: Reason) -> bool:
    """Whether what is installed, or described, could be another one; of unknown versions, where there is a way to tell."""
    return reason.code in _INSTALL or (reason.code == "version_unknown" and bool(reason.remedy))


def _renewal(reason: Reason, around: Circumstances) -> str:
    """The remedy for what is installed; for a runtime or driver that is too old, the version that will do."""
    if reason.remedy or reason.field not in ("runtime", "driver"):
        return reason.remedy
    name = around.registry.platforms[around.device.platform].runtime_name if reason.field == "runtime" else "driver"
    return f"with {name} {reason.allowed}"


def _fitted(kernel: Kernel, request: Request, around: Circumstances) -> Request | None:
    """The request moved, field by field, to the nearest that the kernel's declaration admits."""
    rules = request.rules()
    for _ in range(4):
        wrong = [r.field for r in why_not(kernel, request, around) if r.field in rules]
        if not wrong:
            return request
        try:
            values = {field: _nearest(kernel, field, request, around) for field in dict.fromkeys(wrong)}
            if any(value is None for value in values.values()):
                return None
            request = _moved(request, {field: value[0] for field, value in values.items() if value})
        except ValueError:
            return None
    return None


def _moved(request: Request, values: Mapping[str, Any]) -> Request:
    """The request with other values; fields that held what others imply (a ``v_head_dim`` like ``head_dim``) follow."""
    copy = request.replace(**values)
    follow = {
        name: rule.plain(copy)
        for name, rule in request.rules().items()
        if callable(rule.plain) and name not in values and not request.turns_on(name)
    }
    return copy.replace(**follow)


def _nearest(kernel: Kernel, field: str, request: Request, around: Circumstances) -> tuple[Any, ...] | None:
    if field in kernel.fields:
        rule, value = kernel.fields[field], getattr(request, field)
        if isinstance(value, int) and rule.admits(value, request):
            # The kernel's check refuses it: of the values that its declaration names, the closest that it does not.
            others = [v for v in rule.corners(request) if isinstance(v, int) and v != value]
            others.sort(key=lambda v: abs(v - value))
            served = (v for v in others if not why_not(kernel, _moved(request, {field: v}), around))
            return tuple([*itertools.islice(served, 1), *others][:1]) or None
        return rule.nearest(value, request)[:1] or None
    neutral = request.rules()[field].neutral
    return (neutral(request) if callable(neutral) else neutral,)


def _change(field: str, value: Any) -> str:
    if value is False or value == (None, None) or (field == "softcap" and not value):
        return f"without {field}"
    return (
        f"with {field}"
        if value is True
        else f"with {field} {value:g}"
        if isinstance(value, float)
        else f"with {field} {value}"
    )
