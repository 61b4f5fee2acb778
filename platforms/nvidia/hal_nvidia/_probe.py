"""The probe: sources in order, and the evidence of what each saw or missed.

Where no source answers nothing else is imported: most machines that have this plugin beside others lack its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hal import Evidence, Probe
from hal_nvidia._system import SourceError, System
from hal_nvidia._torch import OTHERS, read_torch

if TYPE_CHECKING:
    from hal_nvidia._cards import Reading

__all__ = ["probe"]


def probe(environ: Mapping[str, str], system: System) -> Probe:
    """NVIDIA devices that a process with this environment sees, in CUDA's order.

    Raises:
        VisibilityError: a shortened UUID in ``CUDA_VISIBLE_DEVICES`` fits several GPUs.
    """
    evidence: list[Evidence] = []
    build = system.torch_build()
    reading = _first_reading(environ, system, build, evidence)
    if reading is None:
        return Probe((), tuple(evidence))
    from hal_nvidia._devices import devices

    found, notes = devices(reading, environ, system, build)
    return Probe(found, (*evidence, *notes))


def _first_reading(
    environ: Mapping[str, str], system: System, build: Mapping[str, str], evidence: list[Evidence]
) -> Reading | None:
    for name, read in _sources(environ, system, build):
        try:
            reading = read()
        except SourceError as missing:
            evidence.append(Evidence(name, str(missing), remedy=missing.remedy))
            continue
        evidence.append(Evidence(name, _summary(reading), found=len(reading.cards)))
        return reading
    if system.is_tegra():
        remedy = "check that /dev/nvgpu and /dev/nvmap are there and may be opened"
        evidence.append(Evidence("Tegra", "this is a Jetson, but its GPU does not answer", remedy=remedy))
    return None


def _summary(reading: Reading) -> str:
    from hal_nvidia._cards import plural

    versions = f"driver {reading.driver or 'unknown'}, CUDA {reading.cuda or 'unknown'}"
    text = f"{plural(len(reading.cards), 'GPU')}, {versions}"
    return f"{text}; does not tell {'; '.join(reading.untold)}" if reading.untold else text


def _sources(
    environ: Mapping[str, str], system: System, build: Mapping[str, str]
) -> tuple[tuple[str, Callable[[], Reading]], ...]:
    def nvml() -> Reading:
        module = system.nvml()
        from hal_nvidia._nvml import read_nvml

        return read_nvml(module)

    def driver() -> Reading:
        if any(build.get(key) for key in OTHERS):
            vendor = next(name for key, name in OTHERS.items() if build.get(key))
            raise SourceError(f"not asked: torch is built for {vendor}, whose machines may carry their own libcuda")
        answer = system.ask_driver(environ)
        from hal_nvidia._driver import read_driver

        return read_driver(answer, system.driver_version())

    return (
        ("NVML", nvml),
        ("CUDA driver", driver),
        ("torch", lambda: read_torch(system.torch())),
    )
