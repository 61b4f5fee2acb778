"""Reasons: why a kernel was refused, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from hal_ops import record

__all__ = ["REASON_CODES", "Reason"]

REASON_CODES = frozenset(
    {
        "not_installed",
        "import_error",
        "version_too_old",
        "version_too_new",
        "version_unknown",
        "version_known_bad",
        "wrong_vendor",
        "arch_too_low",
        "arch_not_listed",
        "runtime_missing",
        "runtime_too_old",
        "driver_too_old",
        "build_lacks_arch",
        "capability_missing",
        "feature_unsupported",
        "dtype",
        "head_dim",
        "page_size",
        "layout",
        "disabled_by_env",
        "not_forced",
        "quarantined",
        "unverified",
        "probe_failed",
        "plugin_failed",
        "not_strict",
        "check",
    }
)


@record(frozen=True)
class Reason:
    """One "no". ``text`` is a whole sentence fragment for people; the other fields are the same facts as data.

    ``field`` is a request field or one of ``device``, ``library``, ``runtime``, ``driver``, ``setting``; ``remedy`` is
    the next step, when there is one.
    """

    code: str
    text: str
    field: str = ""
    wanted: str = ""
    allowed: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.code not in REASON_CODES:
            raise ValueError(f"unknown reason code {self.code!r}; known: {', '.join(sorted(REASON_CODES))}")

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v}

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text
