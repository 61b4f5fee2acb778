"""What this process has made: handles, by what was written, asked for and decided; and every decision, for receipts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from hal import _handle_key
from hal._selection import Selection
from hal_ops import Request

__all__ = ["forget", "handle", "keep_receipt", "receipts", "together"]

_MOST = 4096
_spelled: dict[Any, Any] = {}
"""Handles by calls as they were written: what an equal call costs. Dropped when there are too many."""
_handles: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
"""Handles by requests and by decisions, as long as anybody holds them."""
_decisions: dict[Any, Selection] = {}
_lock = threading.RLock()


def handle(
    kind: str,
    fields: Mapping[str, Any],
    device: Any,
    kernel: Any,
    ask: Callable[[], Request],
    make: Callable[[Request], Any],
) -> Any:
    """The handle of a call: the one that an equal request got, or else what ``make`` makes of the request.

    What was written decides only which handle an equal call gets at once. Any other is made a request first, so what a
    call may say does not depend on those before it.
    """
    around = _handle_key.surroundings()
    written = _handle_key.spelled(kind, fields, device, kernel, around)
    found = _spelled.get(written)
    if found is not None:
        return found
    request = ask()
    key = _handle_key.requested(kind, request, device, kernel, around)
    found = _known(key)
    if found is None:
        found = _first(key, make(request))
    if written is not None:
        with _lock:
            if len(_spelled) >= _MOST:
                _spelled.clear()
            _spelled[written] = found
    return found


def together(kind: str, selection: Selection, kernel: Any, make: Callable[[], tuple[Selection, Any]]) -> Any:
    """The handle of a decision that may have been made for several requests at once: that of an equal one, or a new one.

    ``make`` says what came out in the end, too: another decision, if a kernel turned out to be broken.
    """
    around = _handle_key.surroundings()
    found = _known(_handle_key.decided(kind, selection, kernel, around))
    if found is not None:
        return found
    outcome, made = make()
    return _first(_handle_key.decided(kind, outcome, kernel, around), made)


def _known(key: Any) -> Any:
    with _lock:
        return _handles.get(key)


def _first(key: Any, made: Any) -> Any:
    """What is kept for a key from now on: of several threads that made it, the first."""
    if key is None:
        return made
    with _lock:
        return _handles.setdefault(key, made)


def keep_receipt(selection: Selection) -> None:
    """Remember a decision. One request may have several: of forced kernels, say."""
    device = selection.device
    where = tuple(device.identity().items())
    key = (selection.asked.digest(), selection.request.digest(), where, tuple(selection.kernels().items()))
    with _lock:
        _decisions[key] = selection


def receipts() -> tuple[dict[str, Any], ...]:
    """The receipts of every handle made in this process, cache writes too, for :func:`hal.write_lock` and rank checks.

    A request that was decided in several ways has a receipt of each.
    """
    with _lock:
        kept = tuple(_decisions.values())
    return tuple(selection.receipt() for selection in kept)


def forget() -> None:
    """Drop the handles and receipts that were kept."""
    with _lock:
        _spelled.clear()
        _handles.clear()
        _decisions.clear()
    _handle_key.forget_states()
