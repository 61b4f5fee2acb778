"""Installed libraries, from distribution metadata: nothing is imported to be considered."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from hal._version import Version
from hal_ops import record

__all__ = [
    "Library",
    "as_now",
    "has_module",
    "installed",
    "normalize",
    "simulated_libraries",
    "simulating",
    "torch_build",
]

T = TypeVar("T")


@record(frozen=True)
class Library:
    """A library that kernels are adapted from.

    ``name`` is what people call it; ``distributions`` are the names under which package registries and wheels carry
    it; ``module`` is the module whose presence proves the right one (two distributions may share a name); ``install``
    is the command that brings it.
    """

    name: str
    distributions: tuple[str, ...] = ()
    module: str = ""
    install: str = ""

    def names(self) -> tuple[str, ...]:
        """Distributions that carry the library."""
        return self.distributions or (self.name,)


_simulated: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("hal_libraries", default=None)


def normalize(name: str) -> str:
    """A distribution name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> Version | None:
    """The version of an installed distribution, or None if it is not installed.

    Inside ``hal.simulate(libraries=...)`` the answer comes from there, for every name.
    """
    simulated = _simulated.get()
    if simulated is not None:
        text = simulated.get(normalize(name))
        return None if text is None else Version.parse(text)
    return _installed(normalize(name))


@functools.cache
def _installed(name: str) -> Version | None:
    try:
        return Version.parse(name_and_version(importlib.metadata.distribution(name))[1])
    except importlib.metadata.PackageNotFoundError:
        return None


def name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """From the head of its metadata; ``distribution.metadata`` parses all of it, long description included."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    head = dict(line.partition(": ")[::2] for line in text.partition("\n\n")[0].splitlines())
    try:
        return head["Name"].strip(), head["Version"].strip()
    except KeyError:
        return distribution.metadata["Name"], distribution.version


def has_module(name: str) -> bool:
    """Whether a module is there, by its file: neither it nor its package is imported.

    Inside ``hal.simulate(libraries=...)`` each library is taken for the one that is meant.
    """
    return _simulated.get() is not None or _find_module(name)


@functools.cache
def _find_module(name: str) -> bool:
    package, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        return False  # a stand-in without a spec took its place in sys.modules
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        package = f"{package}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(package, list(spec.submodule_search_locations))
    return spec is not None


@contextlib.contextmanager
def simulated_libraries(libraries: Mapping[str, str] | None) -> Iterator[None]:
    """Answer ``installed`` from a mapping of distribution names to versions; None leaves the outer answer."""
    if libraries is None:
        yield
        return
    token = _simulated.set({normalize(k): str(v) for k, v in libraries.items()})
    try:
        yield
    finally:
        _simulated.reset(token)


def as_now(call: Callable[[], T]) -> Callable[[], T]:
    """The call, to be made later with the libraries that are simulated (or not) now."""
    simulated = _simulated.get()

    def later() -> T:
        token = _simulated.set(simulated)
        try:
            return call()
        finally:
            _simulated.reset(token)

    return later


def simulating() -> tuple[tuple[str, str], ...] | None:
    """The simulated libraries as a hashable key, or None."""
    simulated = _simulated.get()
    return None if simulated is None else tuple(sorted(simulated.items()))


def forget() -> None:
    """Read distribution metadata anew at the next question."""
    _installed.cache_clear()
    _find_module.cache_clear()
    torch_build.cache_clear()


@functools.lru_cache(maxsize=1)
def torch_build() -> Mapping[str, str]:
    """``{"torch": ..., "cuda": ..., "hip": ..., "musa": ...}`` of the installed torch, without importing it.

    Read from ``torch/version.py``, which every build since 1.x writes as plain assignments. Only what the build states
    is there; without torch the mapping is empty.
    """
    spec = importlib.machinery.PathFinder.find_spec("torch", sys.path)
    if spec is None or spec.origin is None:
        return {}
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = re.findall(r"^(__version__|cuda|hip|musa)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return {"torch" if k == "__version__" else k: v for k, v in found}
