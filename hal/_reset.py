"""``reset``: forget what was discovered."""

from __future__ import annotations

from hal import _bind, _devices, _kept, _libraries, _plugins, _selection, _settings

__all__ = ["reset"]


def reset() -> None:
    """Forget plugins, probes, installed libraries, handles and failures, so that the next use looks anew.

    For tests and notebooks, after something was installed or plugged in. Handles that exist keep working.
    """
    _plugins.forget()
    _devices.forget()
    _libraries.forget()
    _kept.forget()
    _selection.failures.clear()
    _bind.fallback_counts.clear()
    _settings._settings.cache_clear()
