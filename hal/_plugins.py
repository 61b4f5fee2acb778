"""Plugins: entry points of the group ``hal.platforms``, names read before anything is imported.

A plugin that fails is rolled back whole, reported by ``hal doctor``, and logged once; it is an error only when it was
asked for by name (``HAL_PLATFORM``, or the allow list of ``HAL_PLUGINS``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Iterator
from typing import Any

from hal import _settings
from hal._errata import load_errata, unique
from hal._platform import PLUGIN_API, Platform
from hal._registry import Registry, Source
from hal.errors import HalError, PluginError, SettingError, did_you_mean

__all__ = ["GROUP", "PluginRecord", "plugins", "registry"]

GROUP = "hal.platforms"
RESERVED = ("cpu", "portable")

log = logging.getLogger("hal")
_lock = threading.RLock()
_extra: dict[str, type[Platform]] = {}


@dataclasses.dataclass(frozen=True)
class PluginRecord:
    """What became of one plugin: ``"loaded"``, ``"denied"`` or ``"failed"``, with the error's text."""

    name: str
    distribution: str
    version: str
    status: str
    error: str = ""


@dataclasses.dataclass(frozen=True)
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
    return _built(*_key())[0]


def plugins() -> tuple[PluginRecord, ...]:
    """What became of every plugin there is."""
    return _built(*_key())[1]


def forget() -> None:
    """Read entry points anew at the next use."""
    _built.cache_clear()
    _discover.cache_clear()


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


def _key() -> tuple[tuple[str, ...], str | None, str, Any, tuple[tuple[str, type[Platform]], ...]]:
    settings = _settings.current()
    platform = settings.value("platform")
    return settings["plugins"], platform.value, platform.source, settings["errata"], tuple(_extra.items())


@functools.lru_cache(maxsize=32)
def _built(
    names: tuple[str, ...],
    platform: str | None,
    source: str,
    errata: Any,
    extra: tuple[tuple[str, type[Platform]], ...],
) -> tuple[Registry, tuple[PluginRecord, ...]]:
    with _lock:
        found = [*_discover(), *(_Found(n, (lambda c=cls: c), Source(n, f"{n}-plugin", "0")) for n, cls in extra)]
        allowed, denied = _allowed(names, [f.name for f in found])
        named = set(allowed) | ({platform} if platform else set())
        _check_platform(platform, source, [f.name for f in found])
        built, records = _load([f for f in found if f.name not in denied], named)
        records += [
            PluginRecord(f.name, f.source.distribution, f.source.version, "denied") for f in found if f.name in denied
        ]
        if errata is not None:
            built.errata = unique((*built.errata, *load_errata(errata)))
        return built, tuple(sorted(records, key=lambda r: r.name))


@functools.lru_cache(maxsize=1)
def _discover() -> tuple[_Found, ...]:
    """Entry points by name, each with its distribution; nothing is imported."""
    found: dict[str, _Found] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        dist = entry.dist
        source = Source(entry.name, dist.metadata["Name"] if dist else "", dist.version if dist else "")
        other = found.get(entry.name)
        if other is not None and other.source != source:
            raise PluginError(
                f"two distributions bring a plugin called {entry.name!r}: {other.source.distribution} and "
                f"{source.distribution}; uninstall one of them",
                plugin=entry.name,
                distribution=source.distribution,
            )
        if entry.name in RESERVED and source.distribution != "torch-hal":
            raise PluginError(
                f"plugin name {entry.name!r} of {source.distribution} is reserved for torch-hal: rename it",
                plugin=entry.name,
                distribution=source.distribution,
            )
        found[entry.name] = _Found(entry.name, entry.load, source)
    return tuple(found.values())


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
    """Two passes, so that a plugin may bring kernels for an op that another brings."""
    built = Registry()
    records: list[PluginRecord] = []
    loaded: list[tuple[_Found, Platform]] = []
    for stage in (_add_platform, _add_kernels):
        pending: list[Any] = list(found) if stage is _add_platform else list(loaded)
        loaded = []
        for item in pending:
            plugin = item if isinstance(item, _Found) else item[0]
            trial = built.copy()
            try:
                loaded.append((plugin, stage(trial, item)))
            except Exception as error:  # noqa: BLE001 - reported below, and raised if the plugin was asked for
                records.append(_failed(plugin, error, fatal=plugin.name in named or plugin.name in RESERVED))
                built = _without(built, plugin)
            else:
                built = trial
    records += [PluginRecord(f.name, f.source.distribution, f.source.version, "loaded") for f, _ in loaded]
    return built, records


def _add_platform(trial: Registry, plugin: _Found) -> Platform:
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
    platform = cls()
    trial.add_platform(platform, plugin.source)
    return platform


def _add_kernels(trial: Registry, item: tuple[_Found, Platform]) -> Platform:
    trial.add_kernels(item[1], item[0].source)
    return item[1]


def _without(built: Registry, plugin: _Found) -> Registry:
    """``built`` with nothing of the plugin left in it."""
    kept = built.copy()
    for key in [key for key, source in kept.sources.items() if source == plugin.source]:
        kind, _, name = key.partition(":")
        getattr(kept, {"op": "ops", "platform": "platforms", "kernel": "kernels"}[kind]).pop(name, None)
        del kept.sources[key]
    return kept


def _failed(plugin: _Found, error: Exception, *, fatal: bool) -> PluginRecord:
    text = f"{type(error).__name__}: {error}"
    if fatal:
        if isinstance(error, PluginError) and error.distribution:
            raise error
        raise PluginError(
            f"plugin {plugin.source} was asked for and failed: {text}",
            plugin=plugin.name,
            distribution=plugin.source.distribution,
        ) from error
    level = logging.WARNING
    log.log(level, "plugin %s is left out: %s", plugin.source, text, exc_info=not isinstance(error, HalError))
    return PluginRecord(plugin.name, plugin.source.distribution, plugin.source.version, "failed", text)
