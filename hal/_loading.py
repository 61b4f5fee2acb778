"""Loading plugins: a registry of those that work, which grows by the ops that are asked for."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal._platform import PLUGIN_API, Platform
from hal._registry import Registry, Source
from hal.errors import PluginError
from hal_ops import record

if TYPE_CHECKING:
    from hal._errata import Erratum

__all__ = ["Found", "Loaded", "PluginRecord"]

Pairs = frozenset[tuple[str, str]]
RESERVED = ("cpu", "portable")

log = logging.getLogger("hal")
lock = threading.RLock()
"""Held while a registry is built or grows: threads that come at once share one, and one warning."""
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
class Found:
    """A plugin as its entry point names it; ``load`` imports the class."""

    name: str
    load: Any
    source: Source


class Loaded:
    """The plugins of some settings that work. One that fails is left out whole, whenever it shows.

    A registry that was given out does not change: what is asked for later is loaded into a copy. What is loaded is pairs
    of an op and the plugin whose contracts and kernels of that op are there.
    """

    def __init__(self, found: list[Found], named: set[str], errata: Path | None) -> None:
        # a name that ours have is refused to others, and not the other way round
        self._left = sorted(found, key=lambda plugin: plugin.name not in RESERVED)
        self._named = named
        self._failed: list[PluginRecord] = []
        self._errata: tuple[Erratum, ...] = ()
        self._registry, self._asked = self._built(frozenset())
        if errata is not None:
            self._errata = self._of_user(errata)
            self._registry.add_errata(self._errata)

    def registry(self, ops: Collection[str] | None = None, platform: str | None = None) -> Registry:
        """The plugins, with these ops loaded whole; None, or a name that no op has, means all there are.

        With ``platform``, what cannot serve its devices may be left to wait.

        Raises:
            PluginError: a plugin failed that was asked for by name, or is built in.
        """
        with lock:
            known = self._registry.op_names()
            wanted = known if ops is None or not known.issuperset(ops) else frozenset(ops)
            plugins = RESERVED if self._may_wait(platform) else tuple(f.name for f in self._left)
            missing = frozenset((op, name) for name in plugins for op in wanted) - self._asked
            if missing:
                self._load(missing)
            return self._registry

    def _may_wait(self, platform: str | None) -> bool:
        """Whether a device of ``platform`` can be served by built-in kernels alone.

        All others wait together or not at all. Built-in kernels keep their names whatever is loaded later; of others,
        one might be left out then, after it was chosen.
        """
        others = [f.name for f in self._left if f.name not in RESERVED]
        return platform is not None and not any(
            name in self._named or self._registry.may_serve(name, platform) for name in others
        )

    def records(self) -> tuple[PluginRecord, ...]:
        """What became of each, all that it declares considered."""
        self.registry()
        loaded = (PluginRecord(f.name, f.source.distribution, f.source.version, "loaded") for f in self._left)
        return (*self._failed, *loaded)

    def _load(self, missing: Pairs) -> None:
        grown = self._registry.copy()
        grown.whole = self.registry
        if self._each(lambda f: grown.add_waiting(grown.platforms[f.name], f.source, _ops_of(f, missing))) is None:
            self._registry, self._asked = grown, self._asked | missing
        else:
            self._registry, self._asked = self._built(self._asked | missing)

    def _built(self, asked: Pairs) -> tuple[Registry, Pairs]:
        """Everything registered anew, so that nothing stays of a plugin that fails; and what is loaded."""
        while True:
            built = Registry()
            # names of ops come first: a plugin may bring kernels for another's op
            failure = self._each(functools.partial(_add_platform, built), functools.partial(_add_kernels, built, asked))
            loaded = {(k.op, built.sources[f"kernel:{k.name}"].plugin) for k in built.kernels.values()}
            if failure is not None:
                self._leave_out(*failure)
            elif loaded <= asked:
                break
            # what is not kept by op is there at once, and is held against all of its op
            asked |= {(op, plugin.name) for op, _ in loaded - asked for plugin in self._left}
        built.add_errata(self._errata)
        built.whole = self.registry
        return built, asked

    def _of_user(self, path: Path) -> tuple[Erratum, ...]:
        """The rows of a user's file, held against all that there is: who adds none pays for no look at it."""
        from hal._errata import load_errata
        from hal._errata_check import checked_errata

        return checked_errata(load_errata(path), f"errata file {path}", self.registry())

    def _each(self, *steps: Callable[[Found], None]) -> tuple[Found, BaseException] | None:
        """Take each step with every plugin, up to the first that fails."""
        for step in steps:
            for plugin in self._left:
                try:
                    step(plugin)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - reported, and raised if it was asked for
                    return plugin, error
        return None

    def _leave_out(self, plugin: Found, error: BaseException) -> None:
        self._failed.append(_failed(plugin, error, self._named))
        self._left.remove(plugin)


def _add_platform(built: Registry, plugin: Found) -> None:
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
    built.add_platform(cls(), plugin.source)


def _add_kernels(built: Registry, asked: Pairs, plugin: Found) -> None:
    built.add_kernels(built.platforms[plugin.name], plugin.source, _ops_of(plugin, asked))


def _ops_of(plugin: Found, pairs: Pairs) -> frozenset[str]:
    return frozenset(op for op, name in pairs if name == plugin.name)


def _failed(plugin: Found, error: BaseException, named: set[str]) -> PluginRecord:
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


def forget_reports() -> None:
    """Report failures anew."""
    _reported.clear()
