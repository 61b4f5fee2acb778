"""Plugins: entry points of the group ``hal.platforms``, names read before anything is imported.

A plugin that fails is rolled back whole, reported by ``hal doctor``, and logged once; it is an error only when it was
asked for by name (``HAL_PLATFORM``, or the allow list of ``HAL_PLUGINS``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Iterator
from typing import Any

from hal import _settings
from hal._platform import PLUGIN_API, Platform
from hal._registry import Registry, Source
from hal.errors import PluginError, SettingError, did_you_mean
from hal_ops import record

__all__ = ["GROUP", "PluginRecord", "plugins", "registry"]

GROUP = "hal.platforms"
RESERVED = ("cpu", "portable")

log = logging.getLogger("hal")
_lock = threading.RLock()
_extra: dict[str, type[Platform]] = {}
_reported: set[tuple[Source, str]] = set()


@record(frozen=True)
class PluginRecord:
    """What became of one plugin: ``"loaded"``, ``"denied"`` or ``"failed"``, with the error's text."""

    name: str
    distribution: str
    version: str
    status: str
    error: str = ""


@record(frozen=True)
class _Found:
    name: str
    load: Any
    source: Source


def registry() -> Registry:
    """The registry of this process, built at first use and again when the settings that decide it change.

    Raises:
        PluginError: two distributions give one plugin name, or a plugin that was asked for by name failed.
        SettingError: a setting names an unknown plugin.
    """
    return _state()[0]


def plugins() -> tuple[PluginRecord, ...]:
    """What became of every plugin there is."""
    return _state()[1]


def _state() -> tuple[Registry, tuple[PluginRecord, ...]]:
    with _lock:  # threads that come at once share one registry, and one warning
        return _built(*_key())


def forget() -> None:
    """Read entry points anew at the next use."""
    _built.cache_clear()
    _discover.cache_clear()
    _reported.clear()


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
) -> tuple[Registry, tuple[PluginRecord, ...]]:
    given = [_Found(n, (lambda c=cls: c), Source(n, f"{n}-plugin", "0")) for n, cls in extra]
    found = _unique([*_discover(), *given])
    allowed, denied = _allowed(names, [f.name for f in found])
    named = set(allowed) | ({platform} if platform else set())
    _check_platform(platform, source, [f.name for f in found])
    built, records = _load([f for f in found if f.name not in denied], named)
    records += [
        PluginRecord(f.name, f.source.distribution, f.source.version, "denied") for f in found if f.name in denied
    ]
    if errata is not None:
        from hal._errata import load_errata

        built.add_errata(load_errata(errata))
    return built, tuple(sorted(records, key=lambda r: r.name))


@functools.lru_cache(maxsize=1)
def _discover() -> tuple[_Found, ...]:
    """Entry points by name, each with its distribution; nothing is imported."""
    found = []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        about = entry.dist.metadata if entry.dist else {"Name": "", "Version": ""}  # parsed anew at each access
        found.append(_Found(entry.name, entry.load, Source(entry.name, about["Name"], about["Version"])))
    return tuple(found)


def _unique(found: list[_Found]) -> list[_Found]:
    """The plugins, each name once.

    Raises:
        PluginError: two distributions bring one name, or one brings a reserved name.
    """
    by_name: dict[str, _Found] = {}
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


def _load(found: list[_Found], named: set[str]) -> tuple[Registry, list[PluginRecord]]:
    """A registry of the plugins that work. One that fails is left out and all is built anew: nothing of it stays."""
    left = list(found)
    records: list[PluginRecord] = []
    while True:
        built = Registry()
        failure = _fill(built, left)
        if failure is None:
            break
        plugin, error = failure
        records.append(_failed(plugin, error, named))
        left.remove(plugin)
    return built, records + [PluginRecord(f.name, f.source.distribution, f.source.version, "loaded") for f in left]


def _fill(built: Registry, found: list[_Found]) -> tuple[_Found, BaseException] | None:
    """Register plugins, up to the first that fails. Ops come first: a plugin may bring kernels for another's op."""
    platforms: dict[str, Platform] = {}
    for step in (_add_platform, _add_kernels):
        for plugin in found:
            try:
                step(built, plugin, platforms)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - reported, and raised if it was asked for
                return plugin, error
    return None


def _add_platform(built: Registry, plugin: _Found, platforms: dict[str, Platform]) -> None:
    cls = plugin.load()
    if not (isinstance(cls, type) and issubclass(cls, Platform)):
        raise PluginError(f"entry point {plugin.name!r} names {cls!r}, which is no subclass of hal.Platform")
    if cls.api != PLUGIN_API:
        older = "upgrade the plugin" if cls.api < PLUGIN_API else "upgrade torch-hal"
        raise PluginError(f"plugin {plugin.source} speaks plugin API {cls.api}, this hal speaks {PLUGIN_API}: {older}")
    if cls.name != plugin.name:
        raise PluginError(
            f"entry point {plugin.name!r} brings a platform that calls itself {cls.name!r}; give both one name"
        )
    platforms[plugin.name] = cls()
    built.add_platform(platforms[plugin.name], plugin.source)


def _add_kernels(built: Registry, plugin: _Found, platforms: dict[str, Platform]) -> None:
    built.add_kernels(platforms[plugin.name], plugin.source)


def _failed(plugin: _Found, error: BaseException, named: set[str]) -> PluginRecord:
    text = f"{type(error).__name__}: {error}"
    if plugin.name in named or plugin.name in RESERVED:
        why = "was asked for" if plugin.name in named else "is built in"
        raise PluginError(
            f"plugin {plugin.source} {why} and failed: {text}",
            plugin=plugin.name,
            distribution=plugin.source.distribution,
        ) from error
    if (plugin.source, text) not in _reported:
        _reported.add((plugin.source, text))
        log.warning("plugin %s is left out: %s", plugin.source, text, exc_info=error)
    return PluginRecord(plugin.name, plugin.source.distribution, plugin.source.version, "failed", text)
