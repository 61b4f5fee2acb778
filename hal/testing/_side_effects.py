"""What a plugin does to a fresh process: run as ``python -m hal.testing._side_effects <task>``, answers in JSON.

Imports the platform class, constructs it, asks for everything it declares, then probes twice: as the process is, and
with the plugin's hardware hidden by its own visibility variables. Traces are reported; none is judged here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hal._device import Probe
from hal._platform import Platform
from hal_ops import resolve_target

__all__ = ["declared_modules"]

_NO_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "pts/", "shm/")


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Run all stages; ``task["target"]`` is the platform class as ``module:qualname``."""
    written: list[str] = []
    sys.addaudithook(lambda event, args: _note_write(event, args, written))
    modules, before = set(sys.modules), _device_nodes()
    platform: Platform = resolve_target(task["target"])()
    vendor = declared_modules(platform)
    facts: dict[str, Any] = {"nodes": sorted(_device_nodes() - before)}
    facts["torch"] = "torch" in sys.modules and "torch" not in modules
    facts["vendor_modules"] = sorted(vendor & (set(sys.modules) - modules))
    hidden = {**os.environ, **dict.fromkeys(platform.visibility, "")}
    facts["probes"] = {"as it is": _probe(platform, dict(os.environ)), "hardware hidden": _probe(platform, hidden)}
    facts["written"] = sorted(set(written))
    facts["context"] = _context_made(platform.torch_type)
    return facts


def declared_modules(platform: Platform) -> set[str]:
    """Top-level modules of the libraries that a platform's kernels come from. Torch is judged on its own."""
    libraries = {lib.name: lib.module or _module(lib.name) for lib in platform.libraries()}
    for kernel in platform.kernels():
        for needs in kernel.needs:
            libraries.setdefault(needs.library, _module(needs.library))
    for declared in (platform.ops, platform.errata):
        _drain(declared())
    own = type(platform).__module__.partition(".")[0]
    return {module.partition(".")[0] for module in libraries.values()} - {"torch", own}


def _module(distribution: str) -> str:
    return distribution.replace("-", "_")


def _drain(values: Iterable[Any]) -> None:
    for _ in values:
        pass


def _note_write(event: str, args: tuple[Any, ...], written: list[str]) -> None:
    """Writes count even where they change nothing: this process inherits what its parent's import wrote."""
    if event in ("os.putenv", "os.unsetenv"):
        written.append(os.fsdecode(args[0]))


def _device_nodes() -> set[str]:
    """Device files that this process holds open: what an initialised driver leaves, whoever its vendor is."""
    table = Path("/proc/self/fd")
    nodes = set()
    for link in table.iterdir() if table.is_dir() else ():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith("/dev/") and not target.removeprefix("/dev/").startswith(_NO_DEVICES):
            nodes.add(target)
    return nodes


def _probe(platform: Platform, environ: dict[str, str]) -> dict[str, Any]:
    try:
        found = platform.probe(environ)
    except Exception:  # noqa: BLE001 - whatever a plugin raises is the finding
        return {"error": traceback.format_exc(limit=-3)}
    if not isinstance(found, Probe):
        return {"error": f"probe() returned {found!r}, which is no hal.Probe"}
    return {"devices": [d.as_dict() for d in found.devices], "evidence": [str(e) for e in found.evidence]}


def _context_made(torch_type: str) -> bool:
    backend = getattr(sys.modules.get("torch"), torch_type, None)
    initialised = getattr(backend, "is_initialized", None)
    return torch_type != "cpu" and initialised is not None and bool(initialised())


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(json.loads(sys.argv[1])), default=str) + "\n")
