"""Logging: the logger ``hal``, and what ``HAL_LOG`` and ``hal.override(log=...)`` do to it."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator

__all__ = ["follow", "log", "logging_at"]

log = logging.getLogger("hal")

_here: contextvars.ContextVar[int | None] = contextvars.ContextVar("hal_log", default=None)
"""The level of the block that this thread or task is in."""


class _Steering(logging.Filter):
    """What the settings make of the logger, over what the application made of it, which holds again once they say nothing.

    A logger has one level for the process. It is the lowest that is asked for anywhere; as a filter this keeps from each
    thread or task what is below its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self.outside: int | None = None
        self.blocks: list[int] = []
        self.found = log.level
        self.made: int | None = None
        self.handler: logging.Handler | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (_here.get() or self.elsewhere())

    def elsewhere(self) -> int:
        """The level outside of all blocks."""
        above = log.parent.getEffectiveLevel() if log.parent is not None else logging.WARNING
        return self.outside or self.found or above

    def apply(self) -> None:
        if self.made is None or log.level != self.made:
            self.found = log.level  # which the application has set since
        if self.outside is None and not self.blocks:
            log.setLevel(self.found)
            self.made = None
            self._stop()
        else:
            self.made = min([self.elsewhere(), *self.blocks])
            log.setLevel(self.made)
            self._start()

    def _start(self) -> None:
        if self.blocks:
            log.addFilter(self)
        else:
            log.removeFilter(self)
        if not log.hasHandlers():
            self.handler = logging.StreamHandler()
            self.handler.setFormatter(logging.Formatter("hal %(levelname)s: %(message)s"))
            log.addHandler(self.handler)

    def _stop(self) -> None:
        log.removeFilter(self)
        if self.handler is not None:
            log.removeHandler(self.handler)
            self.handler = None


_steering = _Steering()


def follow(level: str | None) -> None:
    """Log at the level that the variable or the config file names, and write to stderr where neither this logger nor the
    root one has a handler. None gives the application its own set-up back, under which Python shows warnings by itself."""
    with _steering.lock:
        _steering.outside = None if level is None else _number(level)
        _steering.apply()


@contextlib.contextmanager
def logging_at(level: str) -> Iterator[None]:
    """Log at this level inside the block, in this thread or task; handlers are as :func:`follow` says."""
    number = _number(level)
    token = _here.set(number)
    with _steering.lock:
        _steering.blocks.append(number)
        _steering.apply()
    try:
        yield
    finally:
        with _steering.lock:
            _steering.blocks.remove(number)
            _steering.apply()
        _here.reset(token)


def _number(level: str) -> int:
    number: int = getattr(logging, level.upper())
    return number
