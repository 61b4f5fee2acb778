"""Where facts come from on this machine; tests put recorded ones in its place."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal import torch_build

__all__ = ["SourceError", "System"]


class SourceError(Exception):
    """A source that cannot answer here: why, and what would change it."""

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.remedy = remedy


class System:
    """This machine. ``root`` is where its files are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def mtml(self) -> Any:
        """The module ``pymtml``.

        Raises:
            SourceError: it is not installed.
        """
        try:
            import pymtml
        except ImportError as error:
            raise SourceError(f"pymtml cannot be imported: {error}", "pip install torch-hal-musa[mtml]") from error
        return pymtml

    def torch(self) -> Any:
        """The module torch if it is imported already, else None."""
        return sys.modules.get("torch")

    def torch_build(self) -> Mapping[str, str]:
        """What the installed torch was built for, read without importing it."""
        return torch_build()

    def torch_musa_version(self) -> str:
        """Version of the installed torch_musa, or an empty text."""
        try:
            return importlib.metadata.version("torch_musa")
        except importlib.metadata.PackageNotFoundError:
            return ""

    def toolkit_version(self, environ: Mapping[str, str]) -> str:
        """Version of the MUSA toolkit in ``MUSA_HOME`` (``/usr/local/musa``), or an empty text."""
        home = environ.get("MUSA_HOME", "/usr/local/musa").lstrip("/")
        try:
            text = (self.root / home / "version.json").read_text(encoding="utf-8")
            return _version_in(json.loads(text))
        except (OSError, ValueError):
            return ""


def _version_in(facts: Any) -> str:
    """``musa_version_query`` prints ``{"musa_toolkits": {"version": "5.2.0"}, ...}``; the file has the same form."""
    entry = facts.get("musa_toolkits", {}) if isinstance(facts, dict) else {}
    return str(entry.get("version", "")) if isinstance(entry, dict) else ""
