"""Simulated devices: plain-data hardware through the same code path as probed hardware.

Grammar of ``HAL_DEVICES`` and of ``hal.simulate(devices=...)``::

    devices  = device (";" device)*
    device   = platform ":" arch ("," key "=" value)* ("*" count)?
    key      = "runtime" (or the platform's own name for it: cuda, hip, ...) | "driver" | "memory" | "name"
             | "multiprocessors" | "uuid" | "capabilities"

``memory`` is bytes, or a number with KiB, MiB, GiB or TiB; ``capabilities`` is a list joined by ``+`` that replaces the
arch's own. Example: ``nvidia:sm_90,cuda=12.8,driver=570.86,memory=80GiB*8``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hal._device import Device
from hal._libraries import simulated_libraries
from hal._platform import Platform
from hal._registry import Registry
from hal._version import Version
from hal.errors import SimulationError, did_you_mean
from hal_ops import record

__all__ = ["parse_devices", "simulate"]

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
# patterns as text: most processes never match them, so nothing is compiled at import
_MEMORY = r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\Z"
_COUNT = r"\*\s*(\d+)\s*\Z"
_KEYS = ("runtime", "driver", "memory", "name", "multiprocessors", "uuid", "capabilities")

_devices: contextvars.ContextVar[str | tuple[Device, ...] | None] = contextvars.ContextVar("hal_devices", default=None)


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
    changes = dict(_pair(pair, source, platform) for pair in pairs)
    return dataclasses.replace(platform.simulate(given), **changes), count


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
    key, equals, value = (part.strip() for part in piece.text.partition("="))
    key = "runtime" if key.lower() == platform.runtime_name else key.lower()
    if key not in _KEYS:
        near = did_you_mean(key, (*_KEYS, platform.runtime_name))
        raise SimulationError(f"unknown key {key!r}.{near} Known: {', '.join(_KEYS)}", source=source, position=piece.at)
    at = piece.at + piece.text.find("=") + 1 if equals else piece.at + len(piece.text)
    if not value:
        raise SimulationError(f"{key!r} needs a value: {key}=...", source=source, position=min(at, len(source)))
    try:
        return key, _value(key, value)
    except ValueError as error:
        raise SimulationError(str(error), source=source, position=at) from None


def _value(key: str, value: str) -> Any:
    if key in ("runtime", "driver"):
        version = Version.parse(value)
        if not version.known:
            raise ValueError(f"{value!r} is no version: {version.reason}")
        return version
    if key == "memory":
        return _bytes(value)
    if key == "multiprocessors":
        if not value.isdigit():
            raise ValueError(f"{value!r} is no whole number")
        return int(value)
    return frozenset(value.split("+")) if key == "capabilities" else value


def _bytes(text: str) -> int:
    match = re.match(_MEMORY, text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory: give bytes, or a number with KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@contextlib.contextmanager
def simulate(
    devices: str | Iterable[Device] | None = None, *, libraries: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Pretend, for a ``with`` block, that these devices and installed libraries are the machine's.

    ``devices`` is a text in the grammar of this module, or ``Device`` objects; ``libraries`` maps distribution names to
    versions and replaces what is installed. Either may be left out. On leaving, however that happens, the outer state
    holds again.

    Raises:
        SimulationError: at the first use of the devices, when the text does not parse.
    """
    value = devices if devices is None or isinstance(devices, str) else tuple(devices)
    token = _devices.set(_devices.get() if value is None else value)
    try:
        with simulated_libraries(libraries):
            yield
    finally:
        _devices.reset(token)


def simulated() -> str | tuple[Device, ...] | None:
    """What :func:`simulate` set, or None."""
    return _devices.get()
