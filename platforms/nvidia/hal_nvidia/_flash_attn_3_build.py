"""What the installed flash-attention 3 was built with: read from its files, nothing is imported.

``flash_attn_config.py`` holds the build flags (``hopper/setup.py`` writes it); ``flash_attn_interface.py`` tells the
forks apart by the signatures of its functions. Where the files are not the ones asked about (a simulated library), a
build stands in that is known: upstream's default, or the wheel of tokenspeed-fa3 3.0.0.post20260810.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.machinery
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import hal
from hal_ops import record

__all__ = ["Build", "DISTRIBUTIONS", "build"]

DISTRIBUTIONS = ("flash-attn-3", "tokenspeed-fa3")
_HEAD_DIMS = (64, 96, 128, 192, 256)
_PREFIXES = ("FLASHATTENTION_DISABLE_", "FLASH_ATTENTION_DISABLE_")


@record(frozen=True)
class Build:
    """One build. ``without`` names what was left out, as the build flags do (``BACKWARD``, ``SOFTCAP``, ``SM8x``, ...).

    ``sinks``: the functions take them. ``optional_lse``: they return the LSE on request only, as all do that were made
    since 2025-08-29 (commit 203b9b3d).
    """

    name: str
    without: frozenset[str] = frozenset()
    sinks: bool = False
    optional_lse: bool = True

    @property
    def largest_head_dim(self) -> int:
        """The largest head dim that there is code for."""
        return max((d for d in _HEAD_DIMS if f"HDIM{d}" not in self.without), default=0)

    @property
    def archs(self) -> frozenset[str]:
        """Archs that there is code for, of those that upstream builds for."""
        return frozenset({"sm_90"} if "SM8x" in self.without else {"sm_80", "sm_90"})


UPSTREAM = Build("upstream's flash-attention 3")
"""Upstream's default build, for questions about a library that is not installed."""
_KNOWN = {
    "flash-attn-3": UPSTREAM,
    "tokenspeed-fa3": Build(
        "", frozenset({"BACKWARD", "SOFTCAP", "HDIM96", "SM8x", "HDIMDIFF64", "HDIMDIFF192"}), sinks=True
    ),
}


def build() -> Build | None:
    """The build that is installed (or simulated), or None."""
    for name in DISTRIBUTIONS:
        version = hal.installed(name)
        if version is not None:
            return _build(name, version.text)
    return None


@functools.lru_cache(maxsize=16)
def _build(name: str, version: str) -> Build:
    label = f"{name} {version}"
    if _really_installed(name) == version:
        texts = [_source(module) for module in ("flash_attn_interface", "flash_attn_config")]
        if texts[0] and texts[1]:
            return _read(label, texts[0], texts[1])
    return dataclasses.replace(_KNOWN[name], name=label)


def _really_installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _source(module: str) -> str:
    spec = importlib.machinery.PathFinder.find_spec(module, sys.path)
    if spec is None or spec.origin is None:
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


def _read(label: str, interface: str, config: str) -> Build:
    parameters = _parameters(interface)
    flags = _flags(config)
    left_out = {name.removeprefix(p) for name, on in flags.items() for p in _PREFIXES if on and name.startswith(p)}
    return Build(
        label,
        frozenset(left_out),
        sinks="sinks" in parameters.get("flash_attn_with_kvcache", ()),
        optional_lse="return_attn_probs" in parameters.get("flash_attn_varlen_func", ()),
    )


def _parameters(text: str) -> dict[str, tuple[str, ...]]:
    tree = ast.parse(text)
    return {
        node.name: tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def _flags(text: str) -> dict[str, bool]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG":
            config: dict[str, Any] = ast.literal_eval(node.value)
            return dict(config.get("build_flags", {}))
    return {}
