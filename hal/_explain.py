"""Explanations: a selection as text for people, and as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hal._kernel import Band
from hal._reason import Reason
from hal._selection import PRECEDENCE, Candidate, PhaseChoice, Selection

__all__ = ["as_dict", "render", "render_failure"]

_GAP = 10
_OTHER_HARDWARE = {"wrong_vendor": "vendors' devices", "arch_not_listed": "archs", "arch_too_low": "archs"}


def render(selection: Selection) -> str:
    """The whole decision, a block of lines."""
    return "\n".join(_lines(selection))


def render_failure(selection: Selection) -> str:
    """The same for a request that cannot be served: what failed, everything above, and the next step."""
    lacking = [p for p, c in selection.choices.items() if c.kernel is None]
    forced = {c.forced.source for c in selection.choices.values() if c.kernel is None and c.forced}
    head = f"no kernel can serve {selection.op.name} ({', '.join(lacking)}) on {selection.device}"
    if forced:
        head = f"{' and '.join(sorted(forced))} cannot be obeyed: {head}"
    return "\n".join([head, *(f"  {line}" for line in _lines(selection)), *_next_step(selection, bool(forced))])


def _lines(selection: Selection) -> Iterator[str]:
    device = selection.device
    label = " (simulated)" if device.simulated else ""
    runtime = _runtime(selection)
    yield _row("device", f"{device.platform}:{device.arch.name} {device.name}".rstrip() + f"{runtime}{label}")
    yield _row("request", selection.request.describe())
    if selection.joint:
        yield _row("chosen", ", ".join(selection.joint) + " (left open by the request)")
    yield ""
    shown = [c for ch in selection.choices.values() for c in ch.candidates if not _elsewhere(c, ch)]
    width = max((len(c.kernel.name) for c in shown), default=0)
    for choice in selection.choices.values():
        yield from _phase(choice, width)
    near = [n.text() for n in selection.near_misses()]
    for i, text in enumerate(near):
        yield _row("" if i else "near", text)
    yield _row("steered", _steering(selection))
    yield _row("", f"precedence: {' > '.join(PRECEDENCE)}")
    for note in selection.notes:
        yield _row("note", note)


def _runtime(selection: Selection) -> str:
    device = selection.device
    platform = selection.around.registry.platforms.get(device.platform)
    name = "runtime" if platform is None else platform.runtime_name
    shown = [f"{label} {v}" for label, v in ((name, device.runtime), ("driver", device.driver)) if v.known]
    return "".join(f", {part}" for part in shown)


def _phase(choice: PhaseChoice, width: int) -> Iterator[str]:
    label = choice.phase
    if choice.kernel is None:
        yield _row(label, "no kernel")
        label = ""
    for candidate in (c for c in choice.candidates if not _elsewhere(c, choice)):
        for i, text in enumerate(_describe(candidate)):
            name = candidate.kernel.name if i == 0 else ""
            status = candidate.status if i == 0 else ""
            yield _row(label, f"{name:<{width}}  {status:<8}  {text}".rstrip())
            label = ""
    for where, others in _others(choice).items():
        yield _row(label, f"for other {where} only: {', '.join(others)}")
        label = ""
    if not choice.candidates:
        yield _row(label, "nothing is registered for this phase")


def _elsewhere(candidate: Candidate, choice: PhaseChoice) -> Reason | None:
    """Why a kernel is for other hardware, unless somebody asked for it: one line names them all."""
    if choice.forced is not None and candidate.kernel.answers_to(choice.forced.name):
        return None
    return next((r for r in candidate.reasons if r.code in _OTHER_HARDWARE), None)


def _others(choice: PhaseChoice) -> dict[str, list[str]]:
    """The libraries for other vendors' devices; and the kernels for other archs of this vendor, with those archs."""
    found: dict[str, list[str]] = {}
    for candidate in choice.candidates:
        reason = _elsewhere(candidate, choice)
        if reason is not None:
            where, kernel = _OTHER_HARDWARE[reason.code], candidate.kernel
            text = kernel.library if reason.code == "wrong_vendor" else f"{kernel.name} ({reason.allowed})"
            found.setdefault(where, []).append(text)
    return {where: sorted(set(texts)) for where, texts in sorted(found.items())}


def _describe(candidate: Candidate) -> list[str]:
    reasons = [str(r) for r in candidate.reasons]
    if candidate.status == "refused":
        return reasons
    facts = [candidate.kernel.note, candidate.evidence]
    if candidate.microseconds is not None:
        facts.append(f"measured {candidate.microseconds:.1f} us")
    return [", ".join([f for f in facts if f] + list(candidate.notes))]


def _steering(selection: Selection) -> str:
    choices = selection.choices.values()
    parts = sorted({c.forced.source for c in choices if c.forced}) or ["nothing forced"]
    if any(c.measured for c in choices):
        parts.append("order measured by `hal tune`")
    elif not all(c.forced for c in choices):
        parts.append(f"order from priority bands ({_why_unmeasured(selection)})")
    return "; ".join(parts)


def _why_unmeasured(selection: Selection) -> str:
    if selection.device.simulated:
        return "a simulated device is not measured"
    if any(c.microseconds is not None for choice in selection.choices.values() for c in choice.candidates):
        return "the measured times differ too little, or speak for no verified kernel"
    return "`hal tune` would measure"


def _next_step(selection: Selection, forced: bool) -> Iterator[str]:
    yield "next step:"
    if forced:
        auto = _unforced(selection)
        yield f"  unset what forces it (without it the choice would be {auto}), or change what is refused above"
        return
    near = selection.near_misses()
    if near:
        yield f"  {near[0].text()}"
    else:
        yield "  `hal doctor` shows what is installed and what each platform found"


def _unforced(selection: Selection) -> str:
    """What would be chosen in the phases at fault if nothing forced them."""
    names = []
    for phase, choice in selection.choices.items():
        free = [c for c in choice.candidates if all(r.code == "not_forced" for r in c.reasons)]
        names.append(f"{phase} {free[0].kernel.name if free else 'nothing'}")
    return ", ".join(names)


def _row(label: str, text: str) -> str:
    return f"{label:<{_GAP}}{text}".rstrip()


def as_dict(selection: Selection) -> dict[str, Any]:
    """JSON-ready facts of a selection."""
    return {
        "op": selection.op.name,
        "device": selection.device.as_dict(),
        "request": selection.request.as_dict(),
        "complete": selection.complete,
        "joint": list(selection.joint),
        "phases": {p: _choice_dict(c) for p, c in selection.choices.items()},
        "near_misses": [n.as_dict() for n in selection.near_misses()],
        "precedence": list(PRECEDENCE),
        "notes": list(selection.notes),
    }


def _choice_dict(choice: PhaseChoice) -> dict[str, Any]:
    return {
        "kernel": None if choice.kernel is None else choice.kernel.name,
        "forced_by": None if choice.forced is None else choice.forced.source,
        "measured": choice.measured,
        "reference": choice.kernel is not None and choice.kernel.band == Band.REFERENCE,
        "candidates": [c.as_dict() for c in choice.candidates],
    }
