"""What handles are kept by: everything that decides one, so that an equal call gets the same handle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hal import _devices, _libraries, _plugins, _settings
from hal._registry import Registry
from hal_ops import record

__all__ = ["forget_states", "key_of"]

_states: dict[Any, _State] = {}


def key_of(name: str, fields: Mapping[str, Any], device: Any, kernel: Any) -> Any:
    """Everything that decides a handle, or None when that cannot be hashed. Cheap: it is made at every call."""
    forced = tuple(sorted(kernel.items())) if isinstance(kernel, Mapping) else kernel
    device = getattr(device, "device", device)
    state = (_settings.fingerprint(), _devices.simulated.get(), _libraries.simulating(), _plugins.temporary())
    try:
        if state not in _states:
            _states[state] = _state_of(_plugins.registry(()))
        watched = _states[state]
        seen = (*map(os.environ.get, watched.variables), *map(_stamp, watched.files))
        current = () if device is not None else tuple(map(_devices.current_index, watched.torch_types))
        key = (name, tuple(fields.items()), device, forced, state, seen, current)
        hash(key)
    except TypeError:
        return None
    return key


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
