"""What came out for one phase of a request: the kernel, and every candidate with its reasons."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from hal._forced import Forced
from hal._kernel import Kernel
from hal._reason import Reason
from hal_ops import record

__all__ = ["Candidate", "PhaseChoice"]


@record(frozen=True)
class Candidate:
    """One kernel in the running. ``status`` is ``"chosen"``, ``"eligible"`` or ``"refused"``."""

    kernel: Kernel
    status: str
    reasons: tuple[Reason, ...] = ()
    evidence: str = "claimed"
    microseconds: float | None = None
    notes: tuple[str, ...] = ()
    priority: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready facts."""
        facts: dict[str, Any] = {"kernel": self.kernel.name, "status": self.status, "priority": int(self.priority)}
        facts.update(evidence=self.evidence, reasons=[r.as_dict() for r in self.reasons])
        if self.microseconds is not None:
            facts["microseconds"] = self.microseconds
        if self.notes:
            facts["notes"] = list(self.notes)
        return facts


@record(frozen=True)
class PhaseChoice:
    """What came out for one phase. ``kernel`` is None where nothing is left; ``forced`` says what asked for it."""

    phase: str
    kernel: Kernel | None
    forced: Forced | None = None
    measured: bool = False
    _show: Callable[[], tuple[Candidate, ...]] = dataclasses.field(
        default_factory=lambda: tuple, repr=False, compare=False
    )

    @functools.cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every kernel of the phase with all its reasons: the chosen one, those asked for, those that could serve, the
        rest. Kernels for other vendors' devices cannot be chosen, and are loaded and judged when somebody looks."""
        return self._show()
