"""``Kernel``: the declaration of one implementation of one phase of an op."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from hal._arch import Arch
from hal._constraints import Constraint
from hal._device import Device
from hal._reason import Reason
from hal.errors import RegistrationError, did_you_mean
from hal_ops import Op, Request, record

__all__ = ["Archs", "Band", "EVIDENCE", "Kernel", "Needs"]

EVIDENCE = ("run", "emulated", "compiled", "claimed")
"""How it is known that a kernel does what it declares, the strongest first."""

_NAME = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*\Z")


class Band(enum.IntEnum):
    """Priority bands. A kernel's priority is its band plus 0 to 99; the higher one is preferred."""

    REFERENCE = 0
    """Slow and plain; chosen only when nothing else fits, with a warning."""
    PORTABLE = 100
    """Runs on many devices."""
    PERFORMANT = 200
    """Written or tuned for a family of devices."""
    SPECIALIZED = 300
    """The vendor's best for some devices and shapes."""
    PLUGIN = 400
    """Reserved for distributions other than ours."""

    @classmethod
    def of(cls, priority: int) -> Band:
        """The band that a priority lies in."""
        return cls(min(priority // 100 * 100, cls.PLUGIN))


@record(frozen=True)
class Needs:
    """A library that must be installed: any one of ``distributions``, at a version in ``versions``.

    ``install`` is the command that brings it. Version bounds above the newest tested one need a ``because``. ``module``
    is one that another project of the same distribution name lacks: it is looked for, and not imported.
    """

    library: str
    versions: str = ""
    distributions: tuple[str, ...] = ()
    install: str = ""
    because: str = ""
    module: str = ""

    def names(self) -> tuple[str, ...]:
        """Distributions any one of which will do."""
        return self.distributions or (self.library,)


@record(frozen=True)
class Archs:
    """Archs of one platform: an allow-list (``only``, shell patterns such as ``gfx11*`` may be used) or a minimum.

    ``at_least`` orders archs inside one line; archs of another line of the vendor are refused.
    """

    only: tuple[str, ...] = ()
    at_least: str = ""

    def words(self) -> str:
        """The rule in words, to follow "needs"."""
        return f"{self.at_least} or newer" if self.at_least else " or ".join(self.only) or "any"

    def refusal(self, arch: Arch, parse: Callable[[str], Arch]) -> str:
        """Reason code of why ``arch`` is not among them, or an empty string."""
        if self.only and not any(fnmatchcase(arch.name, pattern) for pattern in self.only):
            return "arch_not_listed"
        if not self.at_least:
            return ""
        least = parse(self.at_least)
        if not arch.comparable(least):
            return "arch_not_listed"
        return "arch_too_low" if arch < least else ""

    def include(self, name: str, parse: Callable[[str], Arch]) -> bool:
        """Whether ``name`` is an arch of the platform whose parser this is, and one of these."""
        try:
            return not self.refusal(parse(name), parse)
        except ValueError:
            return False


@record(frozen=True, kw_only=True)
class Kernel:
    """What one implementation declares. Data: nothing is imported until the kernel is selected.

    Fields:
        name: ``"<library>.<phase>"`` (for ops of one phase ``"<library>.<op>"``), unique; the part before the dot
            groups the kernels of one library.
        op, phase: what it implements.
        target: ``"module:factory"``; the factory takes (request, device) and returns the callable for the phase.
        priority: a :class:`Band` plus 0 to 99. priorities: arch name to the priority there, where another was measured.
        platforms: platform name to :class:`Archs`; empty means every device.
        needs: libraries. runtime, driver: version specifiers of the device's runtime and driver.
        capabilities: what the device must be able to do.
        fields: request field to :class:`Constraint`. Required fields must all be here; a feature that is not here is
            refused unless it is neutral.
        check: for what data cannot say: ``(request, device) -> reasons``; ``device`` is of one of ``platforms``.
        built_archs: archs that the installed binary was built for, where that can be known.
        copies: tensors that the adapter has to copy, in words; shown by ``explain()``. copies_with: request field to those
            that it copies besides, where a request turns the field on (:meth:`hal_ops.Request.turns_on`).
        row_alignment: bytes at whose multiples rows of q, k, v and caches must begin. It is looked at when a handle meets
            tensors of new shapes or strides: what does not fit is refused.
        evidence: arch name to ``"run"``, ``"emulated"``, ``"compiled"`` or ``"claimed"``; ``"*"`` is every other arch.
            evidence_with: request field to the word where a request turns it on; the weaker word counts.
        note: a few words for people.
    """

    name: str
    op: str
    phase: str
    target: str
    priority: int
    fields: Mapping[str, Constraint]
    priorities: Mapping[str, int] = dataclasses.field(default_factory=dict)
    platforms: Mapping[str, Archs] = dataclasses.field(default_factory=dict)
    needs: tuple[Needs, ...] = ()
    runtime: str = ""
    driver: str = ""
    capabilities: frozenset[str] = frozenset()
    check: Callable[[Request, Device], Sequence[Reason]] | None = None
    built_archs: Callable[[], frozenset[str] | None] | None = None
    copies: str = ""
    copies_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    row_alignment: int = 1
    evidence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    evidence_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def library(self) -> str:
        """The part of the name that all kernels of one library share."""
        return self.name.rpartition(".")[0]

    @property
    def band(self) -> Band:
        """The band of the priority."""
        return Band.of(self.priority)

    def priority_on(self, device: Device) -> int:
        """The priority on this device's arch."""
        return self.priorities.get(device.arch.name, self.priority)

    def answers_to(self, name: str) -> bool:
        """Whether a user's ``name`` (of a kernel or of a library) means this kernel."""
        return name in (self.name, self.library)

    def evidence_for(self, arch: str, request: Request | None = None) -> str:
        """The word for what a request asks for on an arch; without a request, for the plainest."""
        words = [self.evidence.get(arch, self.evidence.get("*", "claimed"))]
        if request is not None:
            words += self._turned_on(self.evidence_with, request)
        return max(words, key=EVIDENCE.index)

    def copies_for(self, request: Request) -> str:
        """The tensors that are copied for a request, in words."""
        return "; ".join([*self._turned_on(self.copies_with, request), *([self.copies] if self.copies else [])])

    def _turned_on(self, texts: Mapping[str, str], request: Request) -> list[str]:
        rules = request.rules()
        return [text for name, text in texts.items() if rules[name].applies(self.phase) and request.turns_on(name)]

    def validate(self, op: Op) -> None:
        """Check the declaration against the op's contract.

        Raises:
            RegistrationError: naming every fault.
        """
        faults = [*self._faults(), *self._field_faults(op), *self._evidence_faults(op)]
        if self.phase not in op.phases:
            faults.append(f"phase {self.phase!r} is not one of {', '.join(op.phases)}")
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise RegistrationError(
                f"kernel {self.name!r} of op {op.name!r} is declared wrongly:\n{listed}", name=self.name
            )

    def _faults(self) -> list[str]:
        faults = []
        if not _NAME.match(self.name):
            faults.append("its name must look like 'library.phase' or 'library.op', lower case")
        for priority in (self.priority, *self.priorities.values()):
            if not 0 <= priority < 500:
                faults.append(f"priority {priority} is outside the bands 0 to 499")
        if self.row_alignment < 1 or self.row_alignment & (self.row_alignment - 1):
            faults.append(f"row_alignment {self.row_alignment} is no power of two; 1 byte is any")
        if ":" not in self.target:
            faults.append(f"target {self.target!r} must be 'module:factory'")
        if isinstance(self.capabilities, str):
            faults.append("capabilities must be a set of names, not a string")
        return faults

    def _evidence_faults(self, op: Op) -> list[str]:
        rules = op.request.rules()
        words = {*self.evidence.values(), *self.evidence_with.values()}
        faults = [f"evidence {word!r} is not one of {', '.join(EVIDENCE)}" for word in sorted(words - {*EVIDENCE})]
        # Archs from a minimum on, or all of a platform's, are not told from another vendor's by name: Registry asks.
        if self.platforms and all(archs.only for archs in self.platforms.values()):
            patterns = [pattern for archs in self.platforms.values() for pattern in archs.only]
            strange = [a for a in self.evidence if a != "*" and not any(fnmatchcase(a, p) for p in patterns)]
            faults += [f"evidence for {arch}, which its platforms do not admit" for arch in strange]
        for name in dict.fromkeys((*self.evidence_with, *self.copies_with)):
            if name not in rules or (rules[name].required and rules[name].plain is None):
                faults.append(f"evidence_with or copies_with names {name!r}, which is no field that turns a feature on")
        return faults

    def _field_faults(self, op: Op) -> list[str]:
        rules = op.request.rules()
        known = [*rules, *op.request.derived]
        faults = [
            f"field {name!r} is not in {op.request.__name__}.{did_you_mean(name, known)}"
            for name in self.fields
            if name not in known
        ]
        faults += [
            f"field {n!r} must be a Constraint, not {c!r}"
            for n, c in self.fields.items()
            if not isinstance(c, Constraint)
        ]
        missing = [
            n for n, rule in rules.items() if rule.required and rule.applies(self.phase) and n not in self.fields
        ]
        if missing:
            faults.append(f"it must declare {', '.join(missing)} (Anything() is an answer)")
        return faults


def describe_fields(kernel: Kernel) -> dict[str, Any]:
    """Field to allowed values in words, for tables."""
    return {name: constraint.allowed() for name, constraint in kernel.fields.items()}
