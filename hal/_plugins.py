"""Plugins: entry points of the group ``hal.platforms``, names read before anything is imported.

A plugin that fails is rolled back whole, reported by ``hal doctor``, and logged once; it is an error only when it was
asked for by name (``HAL_PLATFORM``, or the allow list of ``HAL_PLUGINS``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Collection, Iterator
from typing import Any

from hal import _settings
from hal._libraries import name_and_version
from hal._loading import RESERVED, Found, Loaded, PluginRecord, forget_reports, lock
from hal._platform import Platform
from hal._registry import Registry, Source
from hal.errors import PluginError, SettingError, did_you_mean

__all__ = ["GROUP", "PluginRecord", "plugins", "registry"]

GROUP = "hal.platforms"

_extra: dict[str, type[Platform]] = {}


def registry(ops: Collection[str] | None = None, platform: str | None = None) -> Registry:
    """The registry of this process, built at first use and again when the settings that decide it change.

    ``ops`` are those whose contracts and kernels must be loaded; None means all there are. One that is called so by no
    op loads all of them too, to be known by an earlier name or refused. With ``platform``, kernels that cannot serve its
    devices may be missing; :attr:`Registry.whole` brings them.

    Raises:
        PluginError: two distributions give one plugin name, or a plugin that was asked for by name failed.
        SettingError: a setting names an unknown plugin.
    """
    with lock:
        return _built(*_key())[0].registry(ops, platform)


def plugins() -> tuple[PluginRecord, ...]:
    """What became of every plugin there is, all that it declares considered."""
    with lock:
        loaded, denied = _built(*_key())
        return tuple(sorted((*loaded.records(), *denied), key=lambda r: r.name))


def forget() -> None:
    """Read entry points anew at the next use."""
    _built.cache_clear()
    _discover.cache_clear()
    forget_reports()


@contextlib.contextmanager
def temporary_plugin(name: str, platform: type[Platform]) -> Iterator[None]:
    """Add a plugin to this process for a ``with`` block, as if a distribution called ``<name>-plugin`` brought it."""
    if name in _extra:
        raise PluginError(f"a temporary plugin {name!r} is there already", plugin=name)
    _extra[name] = platform
    try:
        yield
    finally:
        del _extra[name]


def temporary() -> tuple[tuple[str, type[Platform]], ...]:
    """The plugins added to this process, as a hashable key."""
    return tuple(_extra.items())


def _key() -> tuple[tuple[str, ...], str | None, str, Any, tuple[tuple[str, type[Platform]], ...]]:
    settings = _settings.current()
    platform = settings.value("platform")
    return settings["plugins"], platform.value, platform.source, settings["errata"], temporary()


@functools.lru_cache(maxsize=32)
def _built(
    names: tuple[str, ...],
    platform: str | None,
    source: str,
    errata: Any,
    extra: tuple[tuple[str, type[Platform]], ...],
) -> tuple[Loaded, tuple[PluginRecord, ...]]:
    given = [Found(n, (lambda c=cls: c), Source(n, f"{n}-plugin", "0")) for n, cls in extra]
    found = _unique([*_discover(), *given])
    allowed, denied = _allowed(names, [f.name for f in found])
    named = set(allowed) | ({platform} if platform else set())
    _check_platform(platform, source, [f.name for f in found])
    loaded = Loaded([f for f in found if f.name not in denied], named, errata)
    left_out = [f for f in found if f.name in denied]
    return loaded, tuple(PluginRecord(f.name, f.source.distribution, f.source.version, "denied") for f in left_out)


@functools.lru_cache(maxsize=1)
def _discover() -> tuple[Found, ...]:
    """Entry points by name, each with its distribution; nothing is imported."""
    found = []
    for entry in sorted(_entry_points(), key=lambda e: e.name):
        about = name_and_version(entry.dist) if entry.dist else ("", "")
        found.append(Found(entry.name, entry.load, Source(entry.name, *about)))
    return tuple(found)


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """``importlib.metadata.entry_points(group=GROUP)``, which parses the files of all distributions for the few of ours."""
    every = importlib.metadata.distributions()
    names = {name_and_version(d)[0] for d in every if GROUP in (d.read_text("entry_points.txt") or "")}
    first = (
        importlib.metadata.distribution(name) for name in sorted(names)
    )  # of several on the path, the first counts
    return [entry for distribution in first for entry in distribution.entry_points.select(group=GROUP)]


def _unique(found: list[Found]) -> list[Found]:
    """The plugins, each name once.

    Raises:
        PluginError: two distributions bring one name, or one brings a reserved name.
    """
    by_name: dict[str, Found] = {}
    for plugin in found:
        name, source = plugin.name, plugin.source
        other = by_name.setdefault(name, plugin)
        if other.source != source:
            raise PluginError(
                f"two distributions bring a plugin called {name!r}: {other.source.distribution} and "
                f"{source.distribution}; uninstall one of them",
                plugin=name,
                distribution=source.distribution,
            )
        if name in RESERVED and source.distribution != "torch-hal":
            raise PluginError(
                f"plugin name {name!r} of {source.distribution} is reserved for torch-hal: rename it",
                plugin=name,
                distribution=source.distribution,
            )
    return list(by_name.values())


def _allowed(names: tuple[str, ...], known: list[str]) -> tuple[set[str], set[str]]:
    for name in names:
        bare = name.removeprefix("-")
        if bare not in known:
            raise SettingError(
                f"HAL_PLUGINS names {bare!r}, and no plugin is called that.{did_you_mean(bare, known)} "
                f"Installed: {', '.join(sorted(known))}",
                setting="HAL_PLUGINS",
            )
    denied = {n[1:] for n in names if n.startswith("-")}
    allowed = {n for n in names if not n.startswith("-")}
    if "portable" in denied:
        raise SettingError(
            "HAL_PLUGINS denies 'portable', which brings the ops themselves; use HAL_DISABLE", setting="HAL_PLUGINS"
        )
    if allowed:
        denied |= set(known) - allowed - set(RESERVED)
    return allowed, denied


def _check_platform(platform: str | None, source: str, known: list[str]) -> None:
    if platform is None or platform in known:
        return
    raise SettingError(
        f"{source} asks for platform {platform!r}, and no plugin brings one.{did_you_mean(platform, known)} "
        f"Installed: {', '.join(sorted(known))}",
        setting="HAL_PLATFORM",
    )
