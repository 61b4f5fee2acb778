"""Devices out of what a source said: visibility and names first, then each GPU's facts and why it cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hal import Device, Evidence, Version
from hal_rocm._arch import UNKNOWN, parse_override
from hal_rocm._capabilities import capabilities
from hal_rocm._facts import facts_of
from hal_rocm._gpus import Gpu, Reading
from hal_rocm._names import with_names
from hal_rocm._system import System
from hal_rocm._visible import visible_gpus

__all__ = ["devices"]

_OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
_OTHERS = {"cuda": "CUDA", "musa": "MUSA"}


def devices(reading: Reading, environ: Mapping[str, str], system: System) -> tuple[tuple[Device, ...], list[Evidence]]:
    """The visible devices in HIP's order, and what is to be said about them.

    Raises:
        VisibilityError: the variables that select devices contradict each other, or a shortened UUID fits several GPUs.
    """
    build = system.torch_build()
    gpus, notes = reading.gpus, []
    if not reading.ordered:
        gpus, visibility = visible_gpus(gpus, _ours(environ, build))
        gpus, naming = with_names([_overridden(gpu, environ) for gpu in gpus], environ, system)
        notes += [*visibility, *naming]
    unusable = _unusable(build)
    if gpus and unusable:
        notes.append(Evidence("torch build", unusable))
    versions = _runtime(build, system), _driver(system)
    return tuple(_device(gpu, i, versions, reading.source, unusable) for i, gpu in enumerate(gpus)), notes


def _ours(environ: Mapping[str, str], build: Mapping[str, str]) -> Mapping[str, str]:
    """The environment, without ``CUDA_VISIBLE_DEVICES`` where torch is built for CUDA: there it selects other cards."""
    if not build.get("cuda"):
        return environ
    return {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}


def _overridden(gpu: Gpu, environ: Mapping[str, str]) -> Gpu:
    """The runtime compiles for ``HSA_OVERRIDE_GFX_VERSION``, and fails on one that it cannot read (``topology.c``)."""
    name = next((n for n in (f"{_OVERRIDE}_{gpu.hsa_node}", _OVERRIDE) if environ.get(n)), None)
    if name is None:
        return gpu
    arch = parse_override(environ[name])
    if arch is None:
        problem = f"{name}={environ[name]!r} is no version such as '10.3.0', so the runtime will not start: unset it"
        return dataclasses.replace(gpu, problem=problem)
    return dataclasses.replace(
        gpu, arch=arch, hardware_arch=gpu.arch.name, problem="" if gpu.arch == UNKNOWN else gpu.problem
    )


def _device(gpu: Gpu, index: int, versions: tuple[Version, Version], source: str, unusable: str) -> Device:
    return Device(
        platform="rocm",
        arch=gpu.arch,
        index=index,
        name=gpu.name,
        memory=gpu.memory,
        multiprocessors=gpu.units,
        runtime=versions[0],
        driver=versions[1],
        uuid=gpu.uuid,
        pci=gpu.pci,
        capabilities=capabilities(gpu.arch),
        torch_type="cuda",
        unusable=gpu.problem or unusable,
        properties=_properties(gpu, source),
    )


def _properties(gpu: Gpu, source: str) -> tuple[tuple[str, object], ...]:
    facts = {
        "source": source,
        "kfd_node": gpu.node,
        "pci_vendor": gpu.pci_vendor,
        "pci_device": gpu.pci_device,
        "hardware_arch": gpu.hardware_arch or None,
    }
    known = facts_of(gpu.arch)
    fixed = () if known is None else known.properties()
    return (*((name, value) for name, value in facts.items() if value is not None), *fixed)


def _runtime(build: Mapping[str, str], system: System) -> Version:
    text = build.get("hip") or system.read("opt/rocm/.info/version")
    return Version.parse(text) if text else Version.unknown("torch is not built for ROCm, and /opt/rocm is not here")


def _driver(system: System) -> Version:
    """The amdgpu that comes with Linux has no version of its own; the kernel's stands for it."""
    text = system.read("sys/module/amdgpu/version") or system.read("proc/sys/kernel/osrelease")
    return Version.parse(text) if text else Version.unknown("the kernel does not tell its version here")


def _unusable(build: Mapping[str, str]) -> str:
    """Why nothing can run on any of the devices, or an empty text."""
    if not build:
        return "torch is not installed: install a ROCm build of torch"
    if build.get("hip"):
        return ""
    torch = f"torch {build.get('torch', '')}".strip()
    other = [f"for {name} {build[key]}, not for ROCm" for key, name in _OTHERS.items() if build.get(key)]
    return f"{torch} is built {(other or ['without ROCm'])[0]}: install a ROCm build of torch"
