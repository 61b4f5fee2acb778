"""Where facts come from on this machine; tests put recorded ones in its place."""

from __future__ import annotations

import importlib.util
import os
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

    def read(self, path: str) -> str:
        """The text of a file, stripped; empty if it is not there."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        return (self.root / path).exists()

    def may_open(self, path: str) -> bool:
        """Whether this process may read and write the file."""
        return os.access(self.root / path, os.R_OK | os.W_OK)

    def torch(self) -> Any:
        """The module torch if it is imported already, else None."""
        return sys.modules.get("torch")

    def torch_build(self) -> Mapping[str, str]:
        """What the installed torch was built for, read without importing it."""
        return torch_build()

    def amdsmi(self, environ: Mapping[str, str]) -> Any:
        """The module ``amdsmi``, initialised.

        Its import prints to stdout and raises KeyError where ``libamd_smi.so`` is missing (amdsmi 7.0.2), so the
        library is looked for first.

        Raises:
            SourceError: it is not installed, its library is missing, or it does not start.
        """
        spec = importlib.util.find_spec("amdsmi")
        if spec is None or spec.origin is None:
            raise SourceError("amdsmi is not installed", "pip install torch-hal-rocm[amdsmi]")
        folders = (Path(spec.origin).parent, self.root / environ.get("ROCM_PATH", "opt/rocm").lstrip("/") / "lib")
        if not any((folder / "libamd_smi.so").exists() for folder in folders):
            raise SourceError("amdsmi is installed, but libamd_smi.so is not", "install amd-smi-lib of ROCm")
        import amdsmi

        try:
            amdsmi.amdsmi_init()
        except amdsmi.AmdSmiException as error:
            raise SourceError(f"amdsmi does not start: {error}") from error
        return amdsmi
