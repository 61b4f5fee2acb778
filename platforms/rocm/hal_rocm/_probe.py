"""The probe: KFD, or an initialised torch, and the evidence of what each saw or missed.

Where neither answers nothing else is imported: most machines that have this plugin beside others lack its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hal import Evidence, Probe
from hal_rocm._kfd import read_kfd
from hal_rocm._system import SourceError, System
from hal_rocm._torch import read_torch

if TYPE_CHECKING:
    from hal_rocm._gpus import Reading

__all__ = ["probe"]


def probe(environ: Mapping[str, str], system: System) -> Probe:
    """AMD devices that a process with this environment sees, in HIP's order.

    Raises:
        VisibilityError: the variables that select devices contradict each other, or a shortened UUID fits several GPUs.
    """
    evidence: list[Evidence] = []
    reading = _first_reading(system, evidence)
    if reading is None:
        return Probe((), tuple(evidence))
    from hal_rocm._devices import devices

    found, notes = devices(reading, environ, system)
    return Probe(found, (*evidence, *notes))


def _first_reading(system: System, evidence: list[Evidence]) -> Reading | None:
    sources: tuple[tuple[str, Callable[[], Reading]], ...] = (
        ("KFD", lambda: read_kfd(system)),
        ("torch", lambda: read_torch(system.torch())),
    )
    for name, read in sources:
        try:
            reading = read()
        except SourceError as missing:
            evidence.append(Evidence(name, str(missing), remedy=missing.remedy))
            continue
        from hal_rocm._gpus import plural

        text = "; ".join([plural(len(reading.gpus), "GPU"), *reading.notes])
        evidence.append(Evidence(name, text, found=len(reading.gpus)))
        return reading
    return None
