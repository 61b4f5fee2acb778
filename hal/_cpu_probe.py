"""The CPU as a device: what ``/proc`` and the operating system say about it. Needs no torch and never fails."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from hal._arch import Arch
from hal._device import Device, Evidence, Probe
from hal._libraries import torch_build
from hal._version import Version

__all__ = ["cpu_capabilities", "parse_cpu_arch", "probe_cpu"]

_SPELLINGS = {
    "amd64": "x86_64",
    "x64": "x86_64",
    "x86-64": "x86_64",
    "arm64": "aarch64",
    "i386": "x86",
    "i486": "x86",
    "i586": "x86",
    "i686": "x86",
}
_FORM = r"(?a:([a-z][a-z0-9_]*?(?:-64)?)(?:[_-](v[1-4]))?\Z)"
_COMMON = ("x86_64", "aarch64")

_TORCH = frozenset(
    {"fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz", "deterministic"},
)
"""What torch's CPU backend computes or converts on any CPU, whatever its instructions."""

_LEVELS = {"v3": frozenset({"avx2"}), "v4": frozenset({"avx2", "avx512f"})}
"""What the levels of the x86-64 psABI promise, of the instructions that matter here."""

_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "neon": "neon",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
"""Names in ``/proc/cpuinfo`` (Linux, ``asm/cpufeatures.h`` of x86 and ``kernel/cpuinfo.c`` of arm64) to ours."""

_ARM_PARTS = {
    (0x41, 0xD0C): "Arm Neoverse-N1",
    (0x41, 0xD40): "Arm Neoverse-V1",
    (0x41, 0xD49): "Arm Neoverse-N2",
    (0x41, 0xD4F): "Arm Neoverse-V2",
    (0x41, 0xD84): "Arm Neoverse-V3",
    (0xC0, 0xAC3): "Ampere-1",
}
"""(implementer, part) in ``/proc/cpuinfo`` on Arm, which states no name (Linux, ``asm/cputype.h`` of arm64)."""


def probe_cpu(environ: Mapping[str, str], root: Path = Path("/")) -> Probe:
    """The one CPU device. ``environ`` hides nothing of it; ``root`` is where ``proc`` is."""
    cpuinfo, memory = _read(root / "proc/cpuinfo"), _memory(_read(root / "proc/meminfo"))
    arch, build = _machine_arch(), torch_build()
    device = Device(
        platform="cpu",
        arch=arch,
        name=_name(cpuinfo) or platform.processor() or platform.machine() or "CPU",
        memory=memory,
        multiprocessors=_cores(),
        runtime=Version.parse(build["torch"]) if "torch" in build else Version.unknown("torch is not installed"),
        driver=Version.parse(platform.release()),
        capabilities=_TORCH | _instructions(cpuinfo),
        torch_type="cpu",
        unusable="" if build else "torch is not installed: pip install torch",
        properties=(("system", platform.system()),),
    )
    text = f"{device.name}, {device.multiprocessors} usable cores"
    return Probe((device,), (Evidence("operating system", text, found=1),))


def parse_cpu_arch(text: str) -> Arch:
    """The arch that ``text`` names: ``x86_64`` (``amd64``), ``aarch64`` (``arm64``), or any other machine name.

    A level of the x86-64 psABI may follow (``x86_64_v3``); it becomes a feature and does not change the identity.

    Raises:
        ValueError: ``text`` is no name of a machine.
    """
    plain = str(text).strip().lower()
    if plain in _COMMON:
        return Arch("cpu", plain)  # which spares most processes the pattern
    match = re.match(_FORM, plain)
    if match is None:
        raise ValueError(f"{text!r} is no CPU arch: write 'x86_64', 'aarch64' or another machine name, or 'x86_64_v3'")
    name = _SPELLINGS.get(match[1], match[1])
    if match[2] and name != "x86_64":
        raise ValueError(f"{text!r}: levels such as {match[2]!r} belong to x86_64")
    return Arch("cpu", name, features=(match[2],) if match[2] else ())


def cpu_capabilities(arch: Arch) -> frozenset[str]:
    """What every CPU of ``arch`` can do: torch's formats, and the instructions that its name promises."""
    if arch.platform != "cpu":
        return frozenset()
    promised = frozenset({"neon"}) if arch.name == "aarch64" else frozenset()
    return _TORCH | promised | frozenset(name for level in arch.features for name in _LEVELS.get(level, ()))


def _machine_arch() -> Arch:
    try:
        return parse_cpu_arch(platform.machine())
    except ValueError:
        return Arch("cpu", "unknown")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(cpuinfo: str, *names: str) -> list[str]:
    """Values of the first of ``names`` that the text has, in order."""
    lines = cpuinfo.split("\n")
    for name in names:
        pairs = (line.removeprefix(name).partition(":") for line in lines if line.startswith(name))
        found = [value.strip() for rest, _, value in pairs if not rest.strip() and value.strip()]
        if found:
            return found
    return []


def _name(cpuinfo: str) -> str:
    stated = _fields(cpuinfo, "model name", "Model", "cpu model")
    if stated:
        return stated[0]
    implementer, part = _fields(cpuinfo, "CPU implementer"), _fields(cpuinfo, "CPU part")
    if not (implementer and part):
        return ""
    try:
        key = (int(implementer[0], 0), int(part[0], 0))
    except ValueError:
        return ""
    return _ARM_PARTS.get(key, f"Arm implementer {implementer[0]}, part {part[0]}")


def _instructions(cpuinfo: str) -> frozenset[str]:
    """Instructions that every listed core has: cores of one machine may differ."""
    cores = [frozenset(line.split()) for line in _fields(cpuinfo, "flags", "Features")]
    shared = frozenset.intersection(*cores) if cores else frozenset()
    return frozenset(ours for flag, ours in _FLAGS.items() if flag in shared)


def _memory(meminfo: str) -> int | None:
    """Bytes of main memory: ``MemTotal``, or what the system's page count says."""
    for stated in _fields(meminfo, "MemTotal"):
        number, _, unit = stated.partition(" ")
        if number.isdecimal() and unit == "kB":
            return int(number) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cores() -> int | None:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count()
