"""Simulated devices: plain-data hardware through the same code path as probed hardware.

Grammar of ``HAL_DEVICES`` and of ``hal.simulate(devices=...)``::

    devices  = device (";" device)*
    device   = platform ":" arch ("," key "=" value)* ("*" count)?
    key      = "runtime" (or the platform's own name for it: cuda, hip, ...) | "driver" | "memory" | "name"
             | "multiprocessors" | "uuid" | "capabilities"

Each key is given once. ``memory`` is a number with its unit, KiB, MiB, GiB or TiB; ``capabilities`` is a list joined by
``+`` that replaces the arch's own. Example: ``nvidia:sm_90,cuda=12.8,driver=570.86,memory=80GiB*8``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hal import _devices
from hal._device import Device
from hal._libraries import normalize, simulated_libraries
from hal._platform import Platform
from hal._registry import Registry
from hal._version import Version
from hal.errors import SimulationError, did_you_mean
from hal_ops import record

__all__ = ["parse_devices", "simulate"]

_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
# patterns as text: most processes never match them, so nothing is compiled at import
_MEMORY = r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\Z"
_VERSION = r"v?\d[\w.+-]*"
_COUNT = r"\*\s*(\d+)\s*\Z"
_KEYS = ("runtime", "driver", "memory", "name", "multiprocessors", "uuid", "capabilities")


@record(frozen=True)
class _Piece:
    text: str
    at: int


def _split(piece: _Piece, separator: str) -> list[_Piece]:
    """Split at a separator, each part stripped and knowing where it starts."""
    parts, at = [], piece.at
    for raw in piece.text.split(separator):
        parts.append(_Piece(raw.strip(), at + len(raw) - len(raw.lstrip())))
        at += len(raw) + len(separator)
    return parts


def parse_devices(text: str, registry: Registry) -> tuple[Device, ...]:
    """The devices that a text in the grammar above describes.

    Raises:
        SimulationError: pointing at the character where the text goes wrong.
    """
    devices: list[Device] = []
    counts: Counter[str] = Counter()
    for piece in _split(_Piece(text, 0), ";"):
        if not piece.text:
            continue
        device, count = _device(piece, text, registry)
        for _ in range(count):
            devices.append(dataclasses.replace(device, index=counts[device.platform]))
            counts[device.platform] += 1
    return tuple(devices)


def _device(piece: _Piece, source: str, registry: Registry) -> tuple[Device, int]:
    match = re.search(_COUNT, piece.text)
    count = int(match[1]) if match else 1
    if not 1 <= count <= 4096:
        raise SimulationError(
            f"{count} devices: give 1 to 4096", source=source, position=piece.at + (match.start(1) if match else 0)
        )
    body = _Piece(piece.text[: match.start()] if match else piece.text, piece.at)
    head, *pairs = _split(body, ",")
    platform, arch = _head(head, source, registry)
    given = Device(
        platform=platform.name,
        arch=arch,
        torch_type=platform.torch_type,
        capabilities=platform.capabilities(arch),
        runtime=Version.unknown("not given to the simulation"),
        driver=Version.unknown("not given to the simulation"),
        simulated=True,
    )
    return dataclasses.replace(platform.simulate(given), **_changes(pairs, source, platform)), count


def _changes(pairs: Iterable[_Piece], source: str, platform: Platform) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    words: dict[str, str] = {}
    for piece in pairs:
        key, value = _pair(piece, source, platform)
        word = piece.text.partition("=")[0].strip()
        if key in changes:
            text = f"{word!r} is given a second time" + f", after {words[key]!r}" * (word != words[key])
            raise SimulationError(text, source=source, position=piece.at)
        changes[key], words[key] = value, word
    return changes


def _head(piece: _Piece, source: str, registry: Registry) -> tuple[Platform, Any]:
    name, colon, arch = piece.text.partition(":")
    name = name.strip().lower()
    if name not in registry.platforms:
        known = sorted(registry.platforms)
        hint = did_you_mean(name, known) or f" Is its plugin installed (torch-hal-{name or '<vendor>'})?"
        raise SimulationError(
            f"no platform is called {name!r}.{hint} Installed: {', '.join(known)}", source=source, position=piece.at
        )
    at = piece.at + len(piece.text.partition(":")[0]) + 1
    if not colon or not arch.strip():
        raise SimulationError(f"after {name!r} comes ':' and an arch", source=source, position=min(at, len(source)))
    try:
        return registry.platforms[name], registry.platforms[name].parse_arch(arch.strip())
    except ValueError as error:
        raise SimulationError(str(error), source=source, position=at) from None


def _pair(piece: _Piece, source: str, platform: Platform) -> tuple[str, Any]:
    word, _, value = (part.strip() for part in piece.text.partition("="))
    key = "runtime" if word.lower() == platform.runtime_name else word.lower()
    if key not in _KEYS:
        known = tuple(dict.fromkeys((platform.runtime_name, *_KEYS)))
        text = f"unknown key {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}"
        raise SimulationError(text, source=source, position=piece.at)
    if not value:
        raise SimulationError(f"{word!r} needs a value: {word}=...", source=source, position=piece.at + len(piece.text))
    at = piece.at + len(piece.text) - len(value)
    if key in ("runtime", "driver"):
        return key, _version(_Piece(value, at), source)
    try:
        return key, _value(key, value)
    except ValueError as error:
        raise SimulationError(str(error), source=source, position=at) from None


def _version(piece: _Piece, source: str) -> Version:
    """A version, and nothing after it: what would be read over is a device or a count that went astray."""
    match = re.match(_VERSION, piece.text)
    if match is None:
        text = f"{piece.text!r} is no version: {Version.parse(piece.text).reason}"
        raise SimulationError(text, source=source, position=piece.at)
    if match.end() < len(piece.text):
        then = "',' and a key, '*' and a count, or ';' and a device"
        text = f"{piece.text!r} is no version: after {match[0]!r} may come {then}"
        raise SimulationError(text, source=source, position=piece.at + match.end())
    return Version.parse(piece.text)


def _value(key: str, value: str) -> Any:
    if key == "memory":
        return _bytes(value)
    if key == "multiprocessors":
        if not value.isdecimal() or not int(value):
            raise ValueError(f"{value!r} is no whole number from 1")
        return int(value)
    if key == "capabilities" and not all(part.strip() for part in value.split("+")):
        raise ValueError(f"{value!r} is no list of capabilities: join names by '+'")
    return frozenset(part.strip() for part in value.split("+")) if key == "capabilities" else value


def _bytes(text: str) -> int:
    match = re.match(_MEMORY, text)
    amount = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2].lower(), 0))
    if not amount:
        raise ValueError(f"{text!r} is no amount of memory: give a number with its unit, KiB, MiB, GiB or TiB")
    return amount


@contextlib.contextmanager
def simulate(
    devices: str | Iterable[Device] | None = None, *, libraries: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Pretend, for a ``with`` block, that these devices and installed libraries are the machine's.

    ``devices`` is a text in the grammar of this module, or ``Device`` objects; ``libraries`` maps distribution names to
    versions and replaces what is installed. Either may be left out. On leaving, however that happens, the outer state
    holds again.

    Raises:
        SimulationError: a library that no kernel here looks for, with the nearest; or, at the first use of the devices, a
            text that does not parse.
    """
    if libraries:
        _check_libraries(libraries)
    value = devices if devices is None or isinstance(devices, str) else tuple(devices)
    token = _devices.simulated.set(_devices.simulated.get() if value is None else value)
    try:
        with simulated_libraries(libraries):
            yield
    finally:
        _devices.simulated.reset(token)


def _check_libraries(names: Iterable[str]) -> None:
    from hal import _plugins

    known = known_libraries(_plugins.registry())
    for name in names:
        if normalize(name) not in known:
            raise SimulationError(unknown_library(name, known))


def unknown_library(name: str, known: Mapping[str, str]) -> str:
    """That no kernel looks for a library of this name, and the nearest; ``known`` is of :func:`known_libraries`."""
    listed = ", ".join(sorted(set(known.values())))
    return f"no kernel here looks for a library called {name!r}.{did_you_mean(name, known)} Known: {listed}"


@functools.lru_cache(maxsize=4)
def known_libraries(registry: Registry) -> dict[str, str]:
    """Normal form of every name that a library goes by, to the distribution to suppose installed."""
    named = [(lib.name, lib.names()) for lib in registry.libraries.values()]
    named += [(needs.library, needs.names()) for kernel in registry.kernels.values() for needs in kernel.needs]
    named += [(e.library, (e.library,)) for e in registry.errata if e.library]
    known = {normalize(name): name for name in ("torch", "triton")}
    for name, distributions in named:
        known.setdefault(normalize(name), distributions[0])
    known.update({normalize(d): d for _, distributions in named for d in distributions})
    return known
