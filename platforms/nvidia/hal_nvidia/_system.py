"""Where facts come from on this machine; tests put recorded ones in its place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal import torch_build

__all__ = ["SourceError", "System"]

_NODES = ("dev/nvidiactl", "dev/nvidia0", "dev/nvgpu", "dev/nvhost-gpu", "dev/dxg")
_TIMEOUT = 30.0


class SourceError(Exception):
    """A source that cannot answer here: why, and what would change it."""

    def __init__(self, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.remedy = remedy


class System:
    """This machine. ``root`` is where its files are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def nvml(self) -> Any:
        """The module ``pynvml``.

        Raises:
            SourceError: there is no sign of a driver, or the module is not installed or not NVIDIA's.
        """
        if not self._has_driver():
            hint = "install the NVIDIA driver, or start the container with the NVIDIA runtime (`--gpus all`)"
            raise SourceError(self._no_driver(), hint)
        try:
            import pynvml
        except ImportError as error:
            raise SourceError(f"pynvml cannot be imported: {error}", "pip install nvidia-ml-py") from error
        if hasattr(pynvml, "mtmlLibraryInit"):
            raise SourceError("the module called pynvml here is Moore Threads' pymtml, not NVML")
        return pynvml

    def ask_driver(self, environ: Mapping[str, str]) -> str:
        """What a child process with this environment learns from the CUDA driver library, as JSON.

        Raises:
            SourceError: there is no sign of a driver, or the child process fails.
        """
        if not self._has_driver():
            raise SourceError(self._no_driver())
        if not sys.executable:
            raise SourceError("not asked: this process knows no Python to start")
        import subprocess

        command = [sys.executable, "-I", str(Path(__file__).with_name("_ask_driver.py"))]
        try:
            done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=_TIMEOUT)
        except (OSError, subprocess.SubprocessError) as error:
            raise SourceError(f"the child that asks libcuda failed: {error}") from error
        if done.returncode:
            raise SourceError(f"the child that asks libcuda died with {done.returncode}: {done.stderr.strip()[-200:]}")
        return done.stdout

    def torch(self) -> Any:
        """The module torch if it is imported already, else None."""
        return sys.modules.get("torch")

    def torch_build(self) -> Mapping[str, str]:
        """What the installed torch was built for, read without importing it."""
        return torch_build()

    def driver_version(self) -> str:
        """Version of the loaded kernel module, or an empty text."""
        return self._read("sys/module/nvidia/version")

    def is_tegra(self) -> bool:
        """Whether this is a Jetson (or another Tegra board)."""
        return (self.root / "etc/nv_tegra_release").exists() or "tegra" in self._read("proc/device-tree/compatible")

    def _has_driver(self) -> bool:
        return sys.platform == "win32" or any((self.root / node).exists() for node in _NODES)

    def _no_driver(self) -> str:
        return f"not asked: none of {', '.join('/' + n for n in _NODES)} is here"

    def _read(self, path: str) -> str:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
