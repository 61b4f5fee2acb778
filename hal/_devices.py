"""Finding devices: every platform is asked, lazily, once per process and visibility setting."""

from __future__ import annotations

import contextvars
import logging
import os
import sys
from functools import lru_cache
from typing import Any

from hal import _plugins, _settings
from hal._device import Device, Evidence, Probe, checked_probe
from hal._platform import Platform
from hal._registry import Registry
from hal.errors import DeviceError, VisibilityError, did_you_mean

__all__ = ["device", "devices", "probe_report"]

log = logging.getLogger("hal")
_probes: dict[tuple[Any, ...], Probe] = {}
_warned: set[str] = set()
simulated: contextvars.ContextVar[str | tuple[Device, ...] | None] = contextvars.ContextVar("hal_devices", default=None)
"""What ``hal.simulate`` puts in the place of probed devices."""


def devices(platform: str | None = None) -> tuple[Device, ...]:
    """Every visible device, accelerators before the CPU; ``platform`` limits the answer to one platform.

    Nothing is initialised on any device. In a simulation (``HAL_DEVICES``, ``hal.simulate``) the answer comes from it.

    Raises:
        DeviceError: no platform is called ``platform``.
        VisibilityError: variables such as ``HIP_VISIBLE_DEVICES`` and ``CUDA_VISIBLE_DEVICES`` contradict each other.
    """
    registry = _plugins.registry(())
    if platform is not None:
        _known_platform(platform, registry)
    found = _simulated(registry)
    if found is None:
        asked = _by_rank(registry) if platform is None else [platform]
        found = tuple(d for name in asked for d in _probe(registry.platforms[name], registry).devices)
    return tuple(d for d in found if platform is None or d.platform == platform)


def probe_report() -> dict[str, Probe]:
    """Platform name to what its probe found and why, for every platform."""
    registry = _plugins.registry(())
    found = _simulated(registry)
    if found is None:
        return {name: _probe(registry.platforms[name], registry) for name in _by_rank(registry)}
    return {
        name: Probe(mine, (Evidence("simulation", f"{len(mine)} simulated", len(mine)),))
        for name in _by_rank(registry)
        if (mine := tuple(d for d in found if d.platform == name))
    }


def device(which: Any = None) -> Device:
    """One device: the default one, or the one that ``which`` names.

    ``which`` may be None, a ``Device``, a tensor, a ``torch.device``, an index on the default platform, or a text:
    ``"nvidia:1"``, ``"nvidia"``, ``"cuda:0"``, ``"cpu"``. The default is the first usable device of ``HAL_PLATFORM``,
    or else of the platform with the highest rank; accelerators come before the CPU.

    Raises:
        DeviceError: there is no such device; the text lists what each probe saw.
    """
    if isinstance(which, Device):
        return which
    which = getattr(which, "device", which)
    if which is None or (isinstance(which, int) and not isinstance(which, bool)):
        return _default(which)
    return _named(str(which).strip().lower())


def meant(which: Any) -> Device | None:
    """The device; None where that is an error, which :func:`device` raises in its turn."""
    try:
        return device(which)
    except DeviceError:
        return None


def forget() -> None:
    """Probe anew at the next question."""
    _probes.clear()
    _simulated_text.cache_clear()
    _warned.clear()


def _by_rank(registry: Registry) -> list[str]:
    return sorted(registry.platforms, key=lambda name: (-registry.platforms[name].rank, name))


def _simulated(registry: Registry) -> tuple[Device, ...] | None:
    text = simulated.get()
    if text is None:
        text = _settings.current()["devices"]
    if text is None or isinstance(text, tuple):
        return text
    return _simulated_text(text, registry)


@lru_cache(maxsize=64)
def _simulated_text(text: str, registry: Registry) -> tuple[Device, ...]:
    from hal._simulate import parse_devices

    return parse_devices(text, registry)


def _probe(platform: Platform, registry: Registry) -> Probe:
    key = (registry.generation, platform.name, *(os.environ.get(name) for name in platform.visibility))
    if key not in _probes:
        _probes[key] = _ask(platform, registry)
    return _probes[key]


def _ask(platform: Platform, registry: Registry) -> Probe:
    try:
        return checked_probe(platform.probe(dict(os.environ)), platform.name)
    except VisibilityError:
        raise
    except (Exception, SystemExit) as error:
        text = f"probe failed: {type(error).__name__}: {error}"
        settings = _settings.current()
        if platform.name in (settings["platform"], *settings["plugins"]):
            source = registry.sources[f"platform:{platform.name}"]
            raise DeviceError(f"plugin {source} was asked for, and its {text}") from error
        log.warning("platform %s: %s", platform.name, text, exc_info=True)
        return Probe((), (Evidence(platform.name, text, remedy="`hal doctor` shows every probe"),))


def _default(index: int | None) -> Device:
    named = _settings.current().value("platform")
    found = [d for d in devices() if named.value in (None, d.platform)]
    usable = [d for d in found if not d.unusable]
    if not usable:
        what = f"{named.source} asks for platform {named.value!r}, and it has" if named.value else "There is"
        raise _no_device(f"{what} no usable device.")
    registry = _plugins.registry(())
    best = _unambiguous(usable, registry)
    _warn_passed_over(found, best)
    mine = [d for d in usable if d.platform == best.platform]
    if index is None:
        index = current_index(best.torch_type)
        return next((d for d in mine if d.index == index), mine[0])
    return _pick(mine, best.platform, index)


def _unambiguous(usable: list[Device], registry: Registry) -> Device:
    def rank(d: Device) -> int:
        return registry.platforms[d.platform].rank

    best = max(usable, key=rank)
    rivals = sorted({d.platform for d in usable if rank(d) == rank(best)})
    if len(rivals) > 1:
        raise DeviceError(
            f"platforms {' and '.join(rivals)} both have devices here, and neither outranks the other: "
            f"set HAL_PLATFORM={rivals[0]} (or one of the others), or pass device="
        )
    return best


def _warn_passed_over(found: list[Device], best: Device) -> None:
    for passed in found:
        if passed.unusable and passed.platform != best.platform and passed.id not in _warned:
            _warned.add(passed.id)
            log.warning("%s cannot be used (%s); the default device is %s", passed, passed.unusable, best)


def current_index(torch_type: str) -> int:
    """The ordinal that torch calls current, if its runtime is up already; asking must not start it."""
    backend = getattr(sys.modules.get("torch"), torch_type, None)
    initialised = getattr(backend, "is_initialized", None)
    if torch_type == "cpu" or backend is None or initialised is None or not initialised():
        return 0
    return int(backend.current_device())


def _named(text: str) -> Device:
    name, _, index = text.partition(":")
    if index and not index.isdigit():
        raise DeviceError(
            f"{text!r} names no device: write a platform or torch device type and an index, such as 'cpu:0'"
        )
    registry = _plugins.registry(())
    found = devices(name if name in registry.platforms else None)
    mine = [d for d in found if d.platform == name]
    if not mine and name not in registry.platforms:
        mine = _of_torch_type(name, found)
    if not mine:
        raise _no_device(f"There is no device {text!r}.{_near(name, found, registry)}")
    return _pick(mine, name, int(index) if index else current_index(mine[0].torch_type))


def _near(name: str, found: tuple[Device, ...], registry: Registry) -> str:
    """What a name may have been meant as that is no platform's and no torch device type's."""
    if name in registry.platforms or name in {p.torch_type for p in registry.platforms.values()}:
        return ""
    return did_you_mean(name, {*registry.platforms, *(d.torch_type for d in found)})


def _of_torch_type(name: str, found: tuple[Device, ...]) -> list[Device]:
    same = [d for d in found if d.torch_type == name]
    usable = [d for d in same if not d.unusable] or same
    platforms = sorted({d.platform for d in usable})
    if len(platforms) > 1:
        raise DeviceError(f"torch device type {name!r} could be {' or '.join(platforms)}: name the platform")
    return usable


def _pick(mine: list[Device], name: str, index: int) -> Device:
    for candidate in mine:
        if candidate.index == index:
            return candidate
    raise DeviceError(f"{name} has no device {index}: visible are {', '.join(d.id for d in mine)}")


def _known_platform(name: str, registry: Registry) -> None:
    if name not in registry.platforms:
        known = sorted(registry.platforms)
        what = f"no platform is called {name!r}.{did_you_mean(name, known)} Installed: {', '.join(known)}"
        raise DeviceError("\n".join([what, *_left_out()]))


def _left_out() -> list[str]:
    """A line for each plugin that takes no part, and why."""
    return [
        f"  plugin {p.name} ({p.distribution} {p.version}) {p.status}" + (f": {p.error}" if p.error else "")
        for p in _plugins.plugins()
        if p.status != "loaded"
    ]


def _no_device(what: str) -> DeviceError:
    report = probe_report()
    lines = [f"  {name}: {e}" for name, probe in report.items() for e in probe.evidence]
    lines += [f"  {d}: {d.unusable}" for probe in report.values() for d in probe.devices if d.unusable]
    lines += [
        *_left_out(),
        "To decide for a device that is not here, write its platform and arch, such as nvidia:sm_90.",
    ]
    return DeviceError("\n".join([f"{what} What each probe saw:", *lines]), evidence=report)
