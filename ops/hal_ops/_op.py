"""Ops: semantic contracts that kernels implement."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from hal_ops._record import record
from hal_ops._request import Request
from hal_ops._traced import Traced

__all__ = ["Op", "resolve_target"]


@record(frozen=True, kw_only=True)
class Op:
    """A semantic contract: request type, phases, reference, input generator and error bounds.

    ``phases`` are the entry points that a kernel may implement; an op without stages has the one phase ``"call"``.
    ``keywords`` names, per phase, every keyword that the front door may pass to an implementation, and
    :meth:`Request.extra_keywords` what one request adds: an implementation whose signature lacks one is refused when it
    is bound. Targets are ``"module:attribute"`` strings, imported on use.

    * ``reference[phase]``: a factory ``(request, device) -> callable`` computing in float32; the oracle.
    * ``cases``: a function ``(request, phase, *, device, seed) -> Case`` that makes inputs with poisoned unused slots.
    * ``aliases``: earlier names of the op, which still work and warn.
    * ``attributes`` of an implementation beside its call: ``"plan"`` for phases that need per-step metadata.
    * ``check``: a factory ``(request, device, values) -> fn``, where ``fn`` takes the call's arguments and says what is
      wrong with them, or "". It is asked before every call of a handle of ``get_op``, whose kernel it is: kernels rely
      on it, and who calls one without a handle keeps the contract alone. With ``values`` it reads numbers on
      accelerators too.
    * ``traced``: the call's schema and empty outputs, for compilers that trace; without it the op cannot be compiled.
    """

    name: str
    summary: str
    request: type[Request]
    phases: tuple[str, ...] = ("call",)
    keywords: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reference: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cases: str | None = None
    check: str | None = None
    aliases: tuple[str, ...] = ()
    traced: Traced | None = None

    def __hash__(self) -> int:
        return hash(self.name)


def resolve_target(target: str) -> Any:
    """Import the ``attribute`` of a ``"module:attribute"`` target.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such attribute.
    """
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
