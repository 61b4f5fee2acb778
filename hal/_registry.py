"""The registry: the platforms, ops, kernels, libraries and errata of one process."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hal._kernel import Band, Kernel
from hal._libraries import Library, normalize
from hal._platform import Platform
from hal.errors import RegistrationError, UnknownKernelError, UnknownOpError, did_you_mean
from hal_ops import Op, record

if TYPE_CHECKING:
    from hal._device import Device
    from hal._errata import Erratum

__all__ = ["Registry", "Source"]

_generations = itertools.count(1)


@record(frozen=True)
class Source:
    """Where a registration came from: entry-point name, distribution and its version."""

    plugin: str
    distribution: str = ""
    version: str = ""

    @property
    def ours(self) -> bool:
        """Whether the distribution is torch-hal, or one that torch-hal's own extras bring."""
        return normalize(self.distribution) in _our_distributions()

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})".replace(" )", ")")


@functools.lru_cache(maxsize=1)
def _our_distributions() -> frozenset[str]:
    """From the metadata of torch-hal: anyone may call a plugin torch-hal-something, and the core names no vendor."""
    from packaging.requirements import Requirement  # asked only about a kernel in the PLUGIN band; a slow import

    try:
        required = importlib.metadata.requires("torch-hal") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    names = {normalize(Requirement(text).name) for text in required}
    return frozenset({"torch-hal", *(name for name in names if name.startswith("torch-hal-"))})


class Registry:
    """Holds what plugins registered. Built whole, then only read; each one has a ``generation`` of its own."""

    def __init__(self) -> None:
        self.generation: int = next(_generations)
        self.platforms: dict[str, Platform] = {}
        self.ops: dict[str, Op] = {}
        self.kernels: dict[str, Kernel] = {}
        self.libraries: dict[str, Library] = {}
        self.errata: tuple[Erratum, ...] = ()
        self.sources: dict[str, Source] = {}

    def add_platform(self, platform: Platform, source: Source) -> None:
        """Register a platform and the ops it brings; :meth:`add_kernels` comes once all ops are there."""
        for op in platform.ops():
            if op.name in self.ops:
                raise RegistrationError(
                    f"op {op.name!r} is registered by {self.sources['op:' + op.name]} already", name=op.name
                )
            self.ops[op.name] = op
            self.sources[f"op:{op.name}"] = source
        self.platforms[platform.name] = platform
        self.sources[f"platform:{platform.name}"] = source

    def add_kernels(self, platform: Platform, source: Source) -> None:
        """Register a platform's kernels, libraries and errata.

        Raises:
            RegistrationError: a wrong declaration, or a name that is taken; both owners are named.
        """
        for kernel in platform.kernels():
            self.kernels[kernel.name] = self._admitted(kernel, source)
            self.sources[f"kernel:{kernel.name}"] = source
        for library in platform.libraries():
            self.libraries.setdefault(library.name, library)
        self.add_errata(platform.errata())

    def add_errata(self, rows: Iterable[Erratum]) -> None:
        """Add known-bad rows.

        Raises:
            RegistrationError: two different rows have one id, or a condition names no field of any request.
        """
        known = {row.id: row for row in self.errata}
        fields = {name for op in self.ops.values() for name in (*op.request.rules(), *op.request.derived)}
        for row in rows:
            wrong = [name for name in row.when if name not in fields]
            if wrong:
                near = did_you_mean(wrong[0], fields)
                text = f"erratum {row.id!r}: no op's request has a field {wrong[0]!r}.{near}"
                raise RegistrationError(text, name=row.id)
            if known.setdefault(row.id, row) != row:
                raise RegistrationError(f"two errata have the id {row.id!r}", name=row.id)
        self.errata = tuple(known.values())

    def _admitted(self, kernel: Kernel, source: Source) -> Kernel:
        if type(kernel) is not Kernel:
            raise RegistrationError(
                f"kernels() of {source} gave {kernel!r}: give hal.Kernel objects, and of no subclass, since the core "
                "alone judges what is declared"
            )
        op = self.op(kernel.op)
        kernel.validate(op)
        self._check_archs(kernel)
        if kernel.name in self.kernels:
            other = self.sources[f"kernel:{kernel.name}"]
            raise RegistrationError(
                f"kernel {kernel.name!r} of {source} is registered by {other} already", name=kernel.name
            )
        if Band.PLUGIN in map(Band.of, (kernel.priority, *kernel.priorities.values())) and source.ours:
            raise RegistrationError(
                f"kernel {kernel.name!r}: the PLUGIN band is for others' distributions", name=kernel.name
            )
        return kernel if kernel.op == op.name else dataclasses.replace(kernel, op=op.name)

    def _check_archs(self, kernel: Kernel) -> None:
        for name, archs in kernel.platforms.items():
            if archs.at_least and name in self.platforms:
                try:
                    self.platforms[name].parse_arch(archs.at_least)
                except ValueError as error:
                    raise RegistrationError(f"kernel {kernel.name!r}: {error}", name=kernel.name) from error

    def copy(self) -> Registry:
        """A registry of its own with the same contents, to try a plugin on."""
        other = Registry()
        for name in ("platforms", "ops", "kernels", "libraries", "sources"):
            getattr(other, name).update(getattr(self, name))
        other.errata = self.errata
        return other

    def op(self, name: str) -> Op:
        """The op called ``name``, or once called so (with a DeprecationWarning).

        Raises:
            UnknownOpError: with the nearest match and the ops there are.
        """
        renamed = next((op for op in self.ops.values() if name in op.aliases), None)
        if renamed is not None and name not in self.ops:
            warnings.warn(f"op {name!r} is now called {renamed.name!r}", DeprecationWarning, stacklevel=3)
            return renamed
        if name not in self.ops:
            known = tuple(sorted(self.ops))
            raise UnknownOpError(
                f"no op is called {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}",
                name=name,
                known=known,
            )
        return self.ops[name]

    def candidates(self, op: str, phase: str, device: Device | None = None) -> tuple[Kernel, ...]:
        """Kernels of one phase, best first: by priority (on ``device``), then by name. Import order plays no part."""
        found = (k for k in self.kernels.values() if (k.op, k.phase) == (op, phase))
        return tuple(sorted(found, key=lambda k: (-(k.priority_on(device) if device else k.priority), k.name)))

    def check_name(self, name: str, op: str, source: str) -> None:
        """Make sure that ``name`` is a kernel or library of ``op``.

        Raises:
            UnknownKernelError: saying which op it belongs to, or what is near.
        """
        if any(k.answers_to(name) for k in self.kernels.values() if k.op == op):
            return
        known = self._names(k for k in self.kernels.values() if k.op == op)
        elsewhere = sorted({k.op for k in self.kernels.values() if k.answers_to(name)})
        why = f"it serves {', '.join(elsewhere)}" if elsewhere else "no kernel or library is called that"
        near = "" if elsewhere else did_you_mean(name, known)
        raise UnknownKernelError(
            f"{source} asks for {name!r} for op {op}, but {why}.{near} Known for {op}: {', '.join(known)}",
            name=name,
            known=known,
        )

    def check_known(self, name: str, source: str) -> None:
        """Make sure that ``name`` is any kernel or library.

        Raises:
            UnknownKernelError: with the nearest match.
        """
        known = self._names(self.kernels.values())
        if name not in known:
            raise UnknownKernelError(
                f"{source} names {name!r}, and no kernel or library is called that.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}",
                name=name,
                known=known,
            )

    @staticmethod
    def _names(kernels: Iterable[Kernel]) -> tuple[str, ...]:
        return tuple(sorted({name for k in kernels for name in (k.name, k.library)}))
