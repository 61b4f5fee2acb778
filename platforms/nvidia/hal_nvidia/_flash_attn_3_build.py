"""What the installed flash-attention 3 was built with: read from its files, nothing is imported.

``flash_attn_config.py`` holds the build flags (``hopper/setup.py`` writes it); ``flash_attn_interface.py`` tells the
forks apart by the signatures of its functions. Where the files are not the ones asked about (a simulated library), a
build stands in that is known: upstream's default, or the wheel of tokenspeed-fa3.

What a build needs of torch and CUDA is a matter of who made it. Upstream's is made on the machine that it is for. The
wheels of tokenspeed-fa3 (3.0.0.post20251110, post20260408 and post20260810) are made already: ``_C.abi3.so`` is linked with
``libcudart.so.13``, and wants 48 functions of torch's stable ABI, eight of which torch 2.8.0 lacks (``aoti_torch_aten_pad``
among them) and 2.9.1 has. Upstream's setup.py targets 2.9 for it (``TORCH_TARGET_VERSION``). Sinks came with post20260408.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hal
from hal import Reason
from hal_ops import record

if TYPE_CHECKING:
    from hal import Device

__all__ = ["Build", "DISTRIBUTIONS", "INSTALL", "SOURCE", "build", "candidate", "unmet"]

DISTRIBUTIONS = ("flash-attn-3", "tokenspeed-fa3")
SOURCE = "build hopper/ of github.com/Dao-AILab/flash-attention"
INSTALL = f"`pip install tokenspeed-fa3` (for sm_90 with CUDA 13 and torch 2.9 or newer), or {SOURCE}"
_HEAD_DIMS = (64, 96, 128, 192, 256)
_PREFIXES = ("FLASHATTENTION_DISABLE_", "FLASH_ATTENTION_DISABLE_")


@record(frozen=True)
class Build:
    """One build. ``without`` names what was left out, as the build flags do (``BACKWARD``, ``SOFTCAP``, ``SM8x``, ...).

    ``sinks``: the functions take them. ``optional_lse``: they return the LSE on request only, as all do that were made
    since 2025-08-29 (commit 203b9b3d). ``cudart``: the version in the name of the CUDA runtime that it is linked with, and
    ``torch`` the torch whose ABI it is made for, where the build is not made on this machine.
    """

    name: str
    without: frozenset[str] = frozenset()
    sinks: bool = False
    optional_lse: bool = True
    cudart: int = 0
    torch: str = ""

    @property
    def largest_head_dim(self) -> int:
        """The largest head dim that there is code for."""
        return max((d for d in _HEAD_DIMS if f"HDIM{d}" not in self.without), default=0)

    def rounded(self, dim: int) -> int:
        """The head dim whose code serves ``dim`` (``hopper/flash_api.cpp``, ``round_up_headdim``)."""
        return next((d for d in _HEAD_DIMS if dim <= d and f"HDIM{d}" not in self.without), _HEAD_DIMS[-1])

    @property
    def archs(self) -> frozenset[str]:
        """Archs that there is code for, of those that upstream builds for."""
        return frozenset({"sm_90"} if "SM8x" in self.without else {"sm_80", "sm_90"})


UPSTREAM = Build("upstream's flash-attention 3")
"""Upstream's default build, for questions about a library that is not installed."""
WHEEL = Build(
    "tokenspeed-fa3",
    frozenset({"BACKWARD", "SOFTCAP", "HDIM96", "SM8x", "HDIMDIFF64", "HDIMDIFF192"}),
    sinks=True,
    cudart=13,
    torch=">=2.9",
)
"""The wheels of tokenspeed-fa3."""
_KNOWN = {"flash-attn-3": UPSTREAM, "tokenspeed-fa3": WHEEL}
_WHEEL_SINKS = ">=3.0.0.post20260408"


def build() -> Build | None:
    """The build that is installed (or simulated), or None."""
    for name in DISTRIBUTIONS:
        version = hal.installed(name)
        if version is not None:
            return _build(name, version.text)
    return None


def candidate(device: Device) -> Build | None:
    """What is known of all builds that could be installed here: nothing where the wheel can be, which has what upstream's
    lacks and lacks what it has."""
    return None if device.arch.name in WHEEL.archs and not any(unmet(WHEEL, device)) else UPSTREAM


def unmet(found: Build, device: Device) -> Iterator[Reason]:
    """What a build that was made elsewhere needs of the machine, and does not find."""
    version, torch = device.runtime, hal.installed("torch")
    if found.cudart and version.known and version.release[0] != found.cudart:
        code = "runtime_too_old" if version.release[0] < found.cudart else "check"
        wanted = f">={found.cudart},<{found.cudart + 1}"
        text = f"{found.name} is linked with libcudart.so.{found.cudart}, of CUDA {found.cudart}; this is {version}"
        yield Reason(code, text, "runtime", str(version), wanted, f"install torch for CUDA {found.cudart}, or {SOURCE}")
    if found.torch and torch is not None and torch.satisfies(found.torch) is False:
        text = f"{found.name} is made for the stable ABI of torch {found.torch}; {torch} is installed"
        yield Reason("version_too_old", text, "library", str(torch), found.torch, f"install a newer torch, or {SOURCE}")


@functools.lru_cache(maxsize=16)
def _build(name: str, version: str) -> Build:
    known = dataclasses.replace(_KNOWN[name], name=f"{name} {version}")
    if _really_installed(name) == version:
        texts = [_source(module) for module in ("flash_attn_interface", "flash_attn_config")]
        if texts[0] and texts[1]:
            return _read(known, texts[0], texts[1])
    lacks_sinks = hal.Version.parse(version).satisfies(_WHEEL_SINKS) is False
    return dataclasses.replace(known, sinks=False) if lacks_sinks else known


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


def _read(known: Build, interface: str, config: str) -> Build:
    parameters = _parameters(interface)
    flags = _flags(config)
    left_out = {name.removeprefix(p) for name, on in flags.items() for p in _PREFIXES if on and name.startswith(p)}
    return dataclasses.replace(
        known,
        without=frozenset(left_out),
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
