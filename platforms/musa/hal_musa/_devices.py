"""Devices out of what the sources said: visibility first, then each GPU's facts and why it cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hal import Device, Evidence, Version
from hal_musa._arch import UNKNOWN
from hal_musa._capabilities import capabilities
from hal_musa._gpus import Gpu, Reading, plural
from hal_musa._system import System
from hal_musa._torch import decode_version
from hal_musa._visible import VARIABLE, by_ordinal, resolve

__all__ = ["devices"]

_OTHERS = {"cuda": "CUDA", "hip": "ROCm"}


def devices(
    mtml: Reading | None, torch: Reading | None, environ: Mapping[str, str], system: System
) -> tuple[tuple[Device, ...], list[Evidence]]:
    """The visible devices in MUSA's order, and what is to be said about them; at least one source has answered.

    Raises:
        VisibilityError: a shortened UUID in ``MUSA_VISIBLE_DEVICES`` fits several GPUs.
    """
    notes: list[Evidence] = []
    if mtml is not None:
        gpus, source = _visible(mtml, torch, environ, notes)
    else:
        assert torch is not None
        gpus, source = torch.gpus, torch.source
    unusable = _unusable(system)
    if gpus and unusable:
        notes.append(Evidence("torch build", unusable))
    versions = _runtime(environ, system), _driver(mtml)
    return tuple(_device(gpu, index, versions, source, unusable) for index, gpu in enumerate(gpus)), notes


def _visible(
    mtml: Reading, torch: Reading | None, environ: Mapping[str, str], notes: list[Evidence]
) -> tuple[tuple[Gpu, ...], str]:
    """The visible GPUs in MUSA's order, and the source of their order."""
    chosen, note = resolve(environ.get(VARIABLE), mtml.gpus)
    if torch is not None:
        return _merged(torch.gpus, chosen), torch.source
    if by_ordinal(environ.get(VARIABLE)) and not all(gpu.like(mtml.gpus[0]) for gpu in mtml.gpus):
        chosen = tuple(_nobody(i, mtml.gpus) for i in range(len(chosen)))
        note = "cards differ, and MTML does not tell in which order MUSA counts them" + (f"; {note}" if note else "")
    if VARIABLE in environ or note:
        value = repr(environ[VARIABLE]) if VARIABLE in environ else "unset, it"
        text = f"{value} shows {plural(len(chosen), 'device')}" + (f": {note}" if note else "")
        notes.append(Evidence(VARIABLE, text, found=len(chosen)))
    return chosen, mtml.source


def _merged(ordered: tuple[Gpu, ...], listed: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """What torch_musa counts, with the UUID and address that MTML has for it where there is no doubt."""
    if len(listed) != len(ordered) or any(a.name != b.name for a, b in zip(ordered, listed, strict=True)):
        return ordered
    return tuple(dataclasses.replace(a, uuid=b.uuid, pci=b.pci) for a, b in zip(ordered, listed, strict=True))


def _nobody(ordinal: int, gpus: tuple[Gpu, ...]) -> Gpu:
    """A GPU that is there, with no facts: better than another one's."""
    names = " or ".join(dict.fromkeys(gpu.name for gpu in gpus))
    problem = f"which card MUSA calls {ordinal} is not known here ({names}): name it by UUID in {VARIABLE}"
    return Gpu(position=ordinal, problem=problem)


def _device(gpu: Gpu, index: int, versions: tuple[Version, Version], source: str, unusable: str) -> Device:
    unknown = "its arch could not be learnt" if gpu.arch == UNKNOWN else ""
    return Device(
        platform="musa",
        arch=gpu.arch,
        index=index,
        name=gpu.name,
        memory=gpu.memory,
        multiprocessors=gpu.multiprocessors,
        runtime=versions[0],
        driver=versions[1],
        uuid=gpu.uuid,
        pci=gpu.pci,
        capabilities=capabilities(gpu.arch),
        torch_type="musa",
        unusable=gpu.problem or unknown or unusable,
        properties=(("source", source),),
    )


def _driver(mtml: Reading | None) -> Version:
    if mtml is not None and mtml.driver:
        return Version.parse(mtml.driver)
    return Version.unknown("only MTML tells it")


def _runtime(environ: Mapping[str, str], system: System) -> Version:
    """What torch_musa says when it is imported, else what its version or the toolkit says."""
    loaded = getattr(getattr(system.torch(), "version", None), "musa", None)
    stated = loaded or system.torch_build().get("musa") or ""
    text = decode_version(str(stated)) if stated else ""
    text = text or system.torch_musa_version().partition("+musa")[2] or system.toolkit_version(environ)
    return Version.parse(text) if text else Version.unknown("neither torch_musa nor /usr/local/musa tells it")


def _unusable(system: System) -> str:
    """Why nothing can run on any of the devices, or an empty text."""
    build = system.torch_build()
    if not build:
        return "torch is not installed: install torch_musa and the torch that it names"
    if build.get("musa") or system.torch_musa_version() or getattr(system.torch(), "musa", None) is not None:
        return ""
    torch = f"torch {build.get('torch', '')}".strip()
    other = [f", which is built for {name} {build[key]}" for key, name in _OTHERS.items() if build.get(key)]
    beside = torch + (other or [""])[0]
    return f"torch_musa is not installed beside {beside}: install torch_musa and the torch that it names"
