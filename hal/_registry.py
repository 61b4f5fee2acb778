"""The registry: the platforms, ops, kernels, libraries and errata of one process."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from hal._by_op import ByOp
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
    """Holds what plugins registered, of the ops that were asked for: contracts and kernels of others may wait, and so may
    kernels that cannot serve the devices that were asked about.

    ``generation`` is another number wherever the platforms may be others. ``whole`` gives a registry that has all there is
    of some ops.
    """

    def __init__(self) -> None:
        self.generation: int = 0
        self.whole: Callable[[Collection[str]], Registry] = lambda ops: self
        self.platforms: dict[str, Platform] = {}
        self.ops: dict[str, Op] = {}
        self.kernels: dict[str, Kernel] = {}
        self.libraries: dict[str, Library] = {}
        self.errata: tuple[Erratum, ...] = ()
        self.sources: dict[str, Source] = {}
        self._waiting: dict[str, ByOp[Op]] = {}
        self._kernels: dict[str, ByOp[Kernel]] = {}

    def add_platform(self, platform: Platform, source: Source) -> None:
        """Register a platform and the names of the ops it brings; :meth:`add_kernels` comes once all names are there."""
        offered = platform.ops()
        if isinstance(offered, ByOp):
            self._name_ops(offered.ops, source)
            self._waiting.update(dict.fromkeys(offered.ops, offered))
        else:
            for op in offered:
                self._name_ops((op.name,), source)
                self.ops[op.name] = op
        self.platforms[platform.name] = platform
        self.sources[f"platform:{platform.name}"] = source
        self.generation = next(_generations)

    def _name_ops(self, names: Iterable[str], source: Source) -> None:
        for name in names:
            if f"op:{name}" in self.sources:
                raise RegistrationError(f"op {name!r} is registered by {self.sources['op:' + name]} already", name=name)
            self.sources[f"op:{name}"] = source

    def add_kernels(self, platform: Platform, source: Source, ops: Collection[str] | None = None) -> None:
        """Register a platform's kernels, libraries and errata; of what it keeps by op, that of ``ops`` (None: all).

        Raises:
            RegistrationError: a wrong declaration, or a name that is taken; both owners are named.
        """
        offered = platform.kernels()
        self._load_ops(source, ops)
        if isinstance(offered, ByOp):
            self._kernels[platform.name] = offered
        self._admit(offered.of(ops) if isinstance(offered, ByOp) else offered, source)
        for library in platform.libraries():
            self.libraries.setdefault(library.name, library)
        self.add_errata(platform.errata())

    def add_waiting(self, platform: Platform, source: Source, ops: Collection[str]) -> None:
        """Register what a platform that is here keeps by op, of ``ops``; raises as :meth:`add_kernels` does."""
        self._load_ops(source, ops)
        if platform.name in self._kernels:
            self._admit(self._kernels[platform.name].of(ops), source)

    def may_serve(self, plugin: str, platform: str) -> bool:
        """Whether kernels of a plugin that may not be loaded yet could be for devices of ``platform``."""
        return plugin in self._kernels and self._kernels[plugin].may_serve(platform)

    def add_errata(self, rows: Iterable[Erratum]) -> None:
        """Add known-bad rows.

        Raises:
            RegistrationError: two different rows have one id, or a condition names no field of any request.
        """
        known = {row.id: row for row in self.errata}
        for row in rows:
            wrong = [name for name in row.when if not any(name in _fields(op) for op in self._every_op())]
            if wrong:
                near = did_you_mean(wrong[0], {name for op in self._every_op() for name in _fields(op)})
                text = f"erratum {row.id!r}: no op's request has a field {wrong[0]!r}.{near}"
                raise RegistrationError(text, name=row.id)
            if known.setdefault(row.id, row) != row:
                raise RegistrationError(f"two errata have the id {row.id!r}", name=row.id)
        self.errata = tuple(known.values())

    def _admit(self, kernels: Iterable[Kernel], source: Source) -> None:
        for kernel in kernels:
            self.kernels[kernel.name] = self._admitted(kernel, source)
            self.sources[f"kernel:{kernel.name}"] = source

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
        if (
            all(archs.only for archs in kernel.platforms.values())
            or not kernel.platforms.keys() <= self.platforms.keys()
        ):
            return  # judged by name alone, or not to be judged here
        parsers = {name: self.platforms[name].parse_arch for name in kernel.platforms}
        for arch in kernel.evidence:
            if arch != "*" and not any(archs.include(arch, parsers[name]) for name, archs in kernel.platforms.items()):
                text = f"kernel {kernel.name!r}: evidence for {arch}, which its platforms do not admit"
                raise RegistrationError(text, name=kernel.name)

    def copy(self) -> Registry:
        """A registry of its own with the same contents, to try a plugin on, or to load more into."""
        other = Registry()
        for name in ("platforms", "ops", "kernels", "libraries", "sources", "_waiting", "_kernels"):
            getattr(other, name).update(getattr(self, name))
        other.errata = self.errata
        other.generation = self.generation
        return other

    def op_names(self) -> frozenset[str]:
        """Names of all ops, loaded or not."""
        return frozenset((*self.ops, *self._waiting))

    def op(self, name: str) -> Op:
        """The op called ``name``, or once called so (with a DeprecationWarning).

        Raises:
            UnknownOpError: with the nearest match and the ops there are.
        """
        if name in self._waiting:
            self._load_op(name)
        if name in self.ops:
            return self.ops[name]
        renamed = next((op for op in self._every_op() if name in op.aliases), None)
        if renamed is not None:
            warnings.warn(f"op {name!r} is now called {renamed.name!r}", DeprecationWarning, stacklevel=3)
            return renamed
        known = tuple(sorted(self.ops))
        raise UnknownOpError(
            f"no op is called {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}",
            name=name,
            known=known,
        )

    def _every_op(self) -> Iterator[Op]:
        """All ops, those that are loaded first; the others are loaded one by one, as far as they are looked at."""
        yield from tuple(self.ops.values())
        yield from map(self.op, tuple(self._waiting))

    def _load_ops(self, source: Source, ops: Collection[str] | None) -> None:
        for name in tuple(self._waiting):
            if (ops is None or name in ops) and self.sources[f"op:{name}"] == source:
                self._load_op(name)

    def _load_op(self, name: str) -> None:
        loaded = next(self._waiting[name].of((name,)))
        self.ops = {**self.ops, name: loaded}  # never changed in place: other threads may be reading it
        self._waiting = {kept: by_op for kept, by_op in self._waiting.items() if kept != name}

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
        near = _meant(name, () if elsewhere else known, [k for k in self.kernels.values() if k.op == op])
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
                f"{source} names {name!r}, and no kernel or library is called that."
                f"{_meant(name, known, self.kernels.values())} Known: {', '.join(known)}",
                name=name,
                known=known,
            )

    @staticmethod
    def _names(kernels: Iterable[Kernel]) -> tuple[str, ...]:
        return tuple(sorted({name for k in kernels for name in (k.name, k.library)}))


_FEW = 8


def _meant(name: str, known: Iterable[str], kernels: Iterable[Kernel]) -> str:
    """The libraries that a distribution of this name brings (``flash_attn_3``: fa3), or else the nearest name."""
    brought: dict[str, set[str]] = {}
    for kernel in kernels:
        for distribution in (d for need in kernel.needs for d in need.names()):
            brought.setdefault(distribution, set()).add(kernel.library)
    for fits in (str.__eq__, str.startswith):
        found = [d for d in brought if len(_letters(name)) > len("torch") and fits(_letters(d), _letters(name))]
        if len(found) == 1 and len(brought[found[0]]) <= _FEW:
            libraries = " or ".join(map(repr, sorted(brought[found[0]])))
            return f" Did you mean {libraries}, of {found[0]}?"
    return did_you_mean(name, known)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _fields(op: Op) -> Collection[str]:
    return (*op.request.rules(), *op.request.derived)
