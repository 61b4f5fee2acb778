"""The probe: MTML, made surer by an initialised torch_musa, and the evidence of what each saw or missed.

Where neither answers nothing else is imported: most machines that have this plugin beside others lack its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hal import Evidence, Probe
from hal_musa._system import SourceError, System
from hal_musa._torch import read_torch

if TYPE_CHECKING:
    from hal_musa._gpus import Reading

__all__ = ["probe"]


def probe(environ: Mapping[str, str], system: System) -> Probe:
    """Moore Threads devices that a process with this environment sees, in MUSA's order.

    Raises:
        VisibilityError: a shortened UUID in ``MUSA_VISIBLE_DEVICES`` fits several GPUs.
    """
    evidence: list[Evidence] = []
    mtml, torch = _readings(system, evidence)
    if mtml is None and torch is None:
        return Probe((), tuple(evidence))
    from hal_musa._devices import devices

    found, notes = devices(mtml, torch, environ, system)
    return Probe(found, (*evidence, *notes))


def _readings(system: System, evidence: list[Evidence]) -> tuple[Reading | None, Reading | None]:
    def ask(name: str, read: Callable[[], Reading]) -> Reading | None:
        try:
            reading = read()
        except SourceError as missing:
            evidence.append(Evidence(name, str(missing), remedy=missing.remedy))
            return None
        from hal_musa._gpus import plural

        text = "; ".join([plural(len(reading.gpus), "GPU"), *(f"does not tell {call}" for call in reading.untold)])
        evidence.append(Evidence(name, text, found=len(reading.gpus)))
        return reading

    def mtml() -> Reading:
        module = system.mtml()
        from hal_musa._mtml import read_mtml

        return read_mtml(module)

    return ask("MTML", mtml), ask("torch_musa", lambda: read_torch(system.torch()))
