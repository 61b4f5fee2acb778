"""What a plugin must hold, a function a promise. Each returns what it found; nothing here needs the hardware."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from typing import Any

from hal import _plugins
from hal._constraints import OneOf
from hal._errata import Erratum
from hal._errata_check import checked_errata
from hal._kernel import Kernel
from hal._libraries import Library
from hal._platform import PLUGIN_API, Platform
from hal._registry import Registry, Source
from hal.errors import HalError, PluginError
from hal.testing._corners import corners
from hal_ops import FieldRule, Op

__all__ = ["Finding", "Plugin", "archs", "contract", "declarations", "imports", "probe", "samples"]

_BAD_ARCHS = ("", " ", "!!", "no such arch")


@dataclasses.dataclass
class Finding:
    """What one check found: ``problems`` are faults; ``notes`` say what could not be checked here, and why."""

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    ran: bool = True


@dataclasses.dataclass(frozen=True)
class Plugin:
    """The platform class under test."""

    cls: type[Platform]

    def platform(self) -> Platform:
        """The class, constructed as HAL constructs it."""
        return self.cls()

    def registry(self) -> Registry:
        """What is registered, and the plugin with it.

        Raises:
            HalError: a declaration of the plugin is wrong.
        """
        registry = _plugins.registry()
        known = registry.platforms.get(self.cls.name)
        if known is not None and type(known) is self.cls:
            return registry
        trial, platform = registry.copy(), self.platform()
        source = Source(self.cls.name, f"{self.cls.name}-plugin", "0")
        trial.add_platform(platform, source)
        trial.add_kernels(platform, source)
        return trial


def contract(plugin: Plugin) -> Finding:
    """The class attributes, and that the class can be constructed."""
    cls, found = plugin.cls, Finding()
    kinds = {str: ("name", "vendor", "torch_type", "runtime_name"), int: ("rank", "api"), tuple: ("visibility",)}
    for name, kind in ((n, k) for k, names in kinds.items() for n in names):
        value = getattr(cls, name)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            found.problems.append(f"{name}={value!r}: give a {kind.__name__}, not empty")
    if cls.api != PLUGIN_API:
        found.problems.append(f"it speaks plugin API {cls.api}, this hal {PLUGIN_API}")
    try:
        plugin.platform()
    except Exception as error:  # noqa: BLE001 - whatever the constructor raises is the finding
        found.problems.append(f"{cls.__name__}() fails: {type(error).__name__}: {error}")
    return found


def declarations(plugin: Plugin) -> Finding:
    """Types and names of everything declared, and that asking twice gives the same."""
    found, platform = Finding(), plugin.platform()
    kinds = {"kernels": Kernel, "ops": Op, "libraries": Library, "errata": Erratum}
    for method, kind in kinds.items():
        values = tuple(getattr(platform, method)())
        strange = [v for v in values if not isinstance(v, kind)]
        found.problems += [f"{method}() holds {v!r}, which is no {kind.__name__}" for v in strange]
        if tuple(map(repr, values)) != tuple(map(repr, getattr(platform, method)())):
            found.problems.append(f"{method}() answers differently when asked again")
    taken = _plugins.registry().platforms.get(platform.name)
    if taken is not None and type(taken) is not plugin.cls:
        found.problems.append(
            f"the name {platform.name!r} is taken by {type(taken).__module__}.{type(taken).__qualname__}"
        )
    if not found.problems:
        try:
            found.problems += _errata_problems(platform, plugin.registry())
        except HalError as error:
            found.problems.append(str(error))
    return found


def _errata_problems(platform: Platform, registry: Registry) -> list[str]:
    """What a user's own rows are held to: names of kernels that there are, and values in the form that requests hold."""
    rows = tuple(platform.errata())
    held = checked_errata(rows, "errata()", registry)
    return [
        f"erratum {row.id!r}: write {name} as {getattr(as_held, name)!r}, which is how devices and requests have it"
        for row, as_held in zip(rows, held, strict=True)
        for name in ("archs", "when")
        if getattr(row, name) != getattr(as_held, name)
    ]


def imports(plugin: Plugin) -> Finding:
    """In a fresh process, importing and declaring touches no torch, vendor library, device or variable."""
    facts, why_none = fresh_process(plugin)
    if facts is None:
        return Finding([why_none])
    problems = []
    if facts["torch"]:
        problems.append("importing it imports torch: import torch inside the kernels' modules instead")
    problems += [f"importing it imports {m}: name it in a kernel's target instead" for m in facts["vendor_modules"]]
    problems += [f"importing it opens {node}: devices are for probe()" for node in facts["nodes"]]
    problems += [f"it writes the environment variable {name}" for name in facts["written"]]
    return Finding(problems)


def probe(plugin: Plugin) -> Finding:
    """probe() raises nothing without the hardware, states its evidence, and creates no context."""
    facts, why_none = fresh_process(plugin)
    if facts is None:
        return Finding([why_none])
    problems = []
    for when, answer in facts["probes"].items():
        if "error" in answer:
            problems.append(f"probe() fails ({when}): {answer['error'].strip()}")
            continue
        if not answer["evidence"]:
            problems.append(f"probe() gives no evidence ({when}): say what was looked at, and what it showed")
        for device in answer["devices"]:
            problems += [f"{device['id']} ({when}): {fault}" for fault in _device_faults(plugin.cls, device)]
    if facts["context"]:
        problems.append(f"probe() initialises torch.{plugin.cls.torch_type}: a probe may not create a device context")
    return Finding(problems)


def _device_faults(cls: type[Platform], device: dict[str, Any]) -> list[str]:
    wanted = {"platform": cls.name, "torch_type": cls.torch_type, "simulated": False}
    faults = [f"{n} is {device[n]!r}, not {v!r}" for n, v in wanted.items() if device[n] != v]
    try:
        named = cls().parse_arch(device["arch"]).name
    except ValueError as error:
        return [*faults, f"parse_arch() refuses the arch of its own device: {error}"]
    if named != device["arch"]:
        faults.append(f"its arch is {device['arch']!r}, and parse_arch() calls that {named!r}")
    return faults


@functools.lru_cache(maxsize=4)
def fresh_process(plugin: Plugin) -> tuple[dict[str, Any] | None, str]:
    """The facts of :mod:`hal.testing._side_effects` about the plugin, or why there are none."""
    target = f"{plugin.cls.__module__}:{plugin.cls.__qualname__}"
    if "<locals>" in target or plugin.cls.__module__ == "__main__":
        return None, f"{target} cannot be imported by another process: define the class at the top of a module"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "hal.testing._side_effects", json.dumps({"target": target})]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return None, f"importing {target} fails in a fresh process: {done.stderr.strip()[-2000:]}"
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts, ""


def archs(plugin: Plugin) -> Finding:
    """parse_arch() gives this platform's archs, knows its own output, and raises ValueError for what is none."""
    found, platform = Finding(), plugin.platform()
    names = arch_names(platform)
    if not names:
        found.notes.append("no kernel of it names an arch; only bad names were tried")
    for name in names:
        try:
            arch = platform.parse_arch(name)
            again = platform.parse_arch(arch.name)
        except ValueError as error:
            found.problems.append(f"parse_arch({name!r}) refuses an arch that its own declarations use: {error}")
            continue
        if arch.platform != platform.name:
            found.problems.append(f"parse_arch({name!r}) gives an arch of {arch.platform!r}")
        if again != arch:
            found.problems.append(f"parse_arch({name!r}) is {arch}, and parse_arch({arch.name!r}) is {again}")
        if not isinstance(platform.capabilities(arch), frozenset):
            found.problems.append(f"capabilities({arch}) is no frozenset")
    for text in _BAD_ARCHS:
        found.problems += _bad_arch(platform, text)
    return found


def _bad_arch(platform: Platform, text: str) -> list[str]:
    try:
        arch = platform.parse_arch(text)
    except ValueError:
        return []
    except Exception as error:  # noqa: BLE001 - the wrong type of error is the finding
        return [f"parse_arch({text!r}) raises {type(error).__name__}, not ValueError: {error}"]
    return [f"parse_arch({text!r}) is {arch!r}: text that is no arch must raise ValueError"]


def arch_names(platform: Platform) -> tuple[str, ...]:
    """Archs that the platform's own kernels name, patterns left out."""
    names: dict[str, None] = {}
    for kernel in platform.kernels():
        mine = kernel.platforms.get(platform.name)
        named = () if mine is None else (*mine.only, *([mine.at_least] if mine.at_least else ()))
        names.update(dict.fromkeys((*named, *(kernel.evidence if mine is not None else ()))))
    return tuple(n for n in names if not any(c in n for c in "*?["))


def samples(plugin: Plugin) -> Finding:
    """Every declared field takes a value that says something in some corner, so that the claim can be tested."""
    found, registry = Finding(), plugin.registry()
    for kernel in plugin.platform().kernels():
        op = registry.op(kernel.op)
        try:
            requests = corners(kernel, op=op)
        except HalError as error:
            found.problems.append(str(error))
            continue
        claimed = [
            n for n, rule in op.request.rules().items() if rule.applies(kernel.phase) and _claims(kernel, n, rule)
        ]
        unused = [n for n in claimed if all(r.is_neutral(n) for r in requests)]
        found.problems += [f"{kernel.name}: {n} is declared, and no corner uses it: give it samples" for n in unused]
    return found


def _claims(kernel: Kernel, name: str, rule: FieldRule) -> bool:
    """Whether a kernel declares more of a feature than that it is off."""
    constraint = kernel.fields.get(name)
    if constraint is None or rule.required:
        return False
    return not isinstance(constraint, OneOf) or any(v != rule.neutral for v in constraint.values)


def load(platform: type[Platform] | str) -> Plugin:
    """The plugin of a class, or of the name of an installed plugin.

    Raises:
        PluginError: no such plugin, or it failed to load; the text says why.
    """
    if not isinstance(platform, str):
        return Plugin(platform)
    found = _plugins.registry().platforms.get(platform)
    if found is not None:
        return Plugin(type(found))
    records = {r.name: r for r in _plugins.plugins()}
    if platform in records:
        record = records[platform]
        raise PluginError(f"plugin {platform!r} is {record.status}: {record.error}", plugin=platform)
    raise PluginError(f"no plugin is called {platform!r}; installed: {', '.join(sorted(records))}", plugin=platform)
