"""Importing and making a kernel in a process of its own, so that code which kills its process can be named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["make_here", "try_kernels"]

TIMEOUT = 300
"""Seconds that one kernel may take: some compile when they are made."""

_CODE = "import sys; from hal.cli._smoke import make_here; make_here(sys.argv[1])"


def try_kernels(
    wanted: Mapping[str, Mapping[str, Any]], device: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Make each kernel; ``wanted`` maps its name to a request that it serves. ``error`` is empty where that worked."""
    rows = []
    for name, request in wanted.items():
        say(name)
        task = json.dumps({"kernel": name, "request": request, "device": device})
        rows.append({"kernel": name, "error": _run(task)})
    return rows


def _run(task: str) -> str:
    try:
        command = [sys.executable, "-c", _CODE, task]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"it was not made within {TIMEOUT} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"its process died of {signal.Signals(-done.returncode).name} while the kernel was imported or made"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"its process exited with {done.returncode} and said nothing"


def make_here(task: str) -> None:
    """Import and make one kernel in this process."""
    from hal import _bind, _devices, _plugins

    asked = json.loads(task)
    registry = _plugins.registry()
    kernel = registry.kernels[asked["kernel"]]
    op = registry.op(kernel.op)
    _bind.build(kernel, op, op.request(**asked["request"]), _devices.device(asked["device"]))
