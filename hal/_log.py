"""Logging: the logger ``hal``, and what ``HAL_LOG`` does to it."""

from __future__ import annotations

import logging

__all__ = ["log", "log_to_stderr"]

log = logging.getLogger("hal")


def log_to_stderr(level: str) -> None:
    """Log at ``level``, and write to stderr where neither this logger nor the root one has a handler.

    Without ``HAL_LOG`` the application's own logging set-up decides, and Python shows warnings by itself.
    """
    log.setLevel(level.upper())
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hal %(levelname)s: %(message)s"))
        log.addHandler(handler)
