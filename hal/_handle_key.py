"""What handles are known by: everything that decides one, so that an equal request gets the same handle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hal import _devices, _libraries, _plugins, _settings
from hal._registry import Registry
from hal_ops import Request, record

if TYPE_CHECKING:
    from hal._selection import Selection

__all__ = ["decided", "forget_states", "requested", "spelled", "surroundings"]

_states: dict[Any, _State] = {}


def surroundings() -> Any:
    """The settings, plugins, files and simulations that decisions depend on, and which devices are current.

    None if they cannot be hashed.
    """
    state = (_settings.fingerprint(), _devices.simulated.get(), _libraries.simulating(), _plugins.temporary())
    try:
        if state not in _states:
            _states[state] = _state_of(_plugins.registry(()))
    except TypeError:
        return None
    watched = _states[state]
    seen = (*map(os.environ.get, watched.variables), *map(_stamp, watched.files))
    return (state, seen), tuple(map(_devices.current_index, watched.torch_types))


def spelled(kind: str, fields: Mapping[str, Any], device: Any, kernel: Any, around: Any) -> Any:
    """A call as it was written, which is cheap to know again. Types count: 2.0 is equal to 2, and no number of heads.

    None if it cannot be hashed.
    """
    device = getattr(device, "device", device)
    values = tuple(fields.values())
    kinds = tuple(map(type, values))
    inner = _kinds(values) if tuple in kinds else ()
    forced = _forced(kernel)
    return _hashable(kind, tuple(fields), values, kinds, inner, type(device), device, forced, _kinds(forced), around)


def requested(kind: str, request: Request, device: Any, kernel: Any, around: Any) -> Any:
    """What a call asks for, however it is written; None if it cannot be hashed."""
    return _hashable(kind, request, _devices.meant(device), _forced(kernel), around and around[0])


def decided(kind: str, selection: Selection, kernel: Any, around: Any) -> Any:
    """What came out, alone or together with other layers; None if it cannot be hashed."""
    kernels = tuple(selection.kernels().items())
    asked = (selection.asked, selection.request, selection.device)
    return _hashable(kind, *asked, kernels, _forced(kernel), around and around[0])


def _forced(kernel: Any) -> Any:
    return tuple(sorted(kernel.items(), key=repr)) or None if isinstance(kernel, Mapping) else kernel


def _kinds(value: Any) -> Any:
    return tuple(map(_kinds, value)) if isinstance(value, tuple) else type(value)


def _hashable(*key: Any) -> Any:
    """The key; None if it cannot be hashed, or ends in surroundings that cannot."""
    try:
        hash(key)
    except TypeError:
        return None
    return None if key[-1] is None else key


@record(frozen=True)
class _State:
    """What to look at to see whether a kept handle still is what would be made."""

    variables: tuple[str, ...]
    torch_types: tuple[str, ...]
    files: tuple[str, ...]


def _state_of(registry: Registry) -> _State:
    platforms, settings = registry.platforms.values(), _settings.current()
    variables = dict.fromkeys(name for p in platforms for name in p.visibility)
    torch_types = dict.fromkeys(p.torch_type for p in platforms if p.torch_type != "cpu")
    kept = [settings.cache_dir() / "ledger.json", settings.cache_dir() / "measurements.json"]
    files = [str(f) for f in (*kept, settings["lock"]) if f is not None]
    return _State(tuple(variables), tuple(torch_types), tuple(files))


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def forget_states() -> None:
    """Drop what is remembered of settings and plugins."""
    _states.clear()
