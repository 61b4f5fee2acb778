"""Moore Threads GPUs for ``hal``: probe, archs, capabilities, and kernels of MATE and torch_musa."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hal import Arch, ByOp, Device, Erratum, Kernel, Library, Platform, Probe

if TYPE_CHECKING:
    from hal_musa._system import System

__all__ = ["MusaPlatform"]

_KERNELS: ByOp[Kernel] = ByOp(
    {
        "hal_musa.mate_kernels:KERNELS": ("attention",),
        "hal_musa.torch_musa_kernels:KERNELS": ("attention", "rms_norm", "silu_and_mul"),
    },
    platforms=("musa",),
)


class MusaPlatform(Platform):
    """MUSA devices, found through MTML or an initialised torch_musa; never through ``torch.cuda``."""

    name = "musa"
    vendor = "Moore Threads"
    api = 1
    torch_type = "musa"
    runtime_name = "musa"
    visibility = ("MUSA_VISIBLE_DEVICES",)

    def __init__(self, system: System | None = None) -> None:
        """``system`` is where facts come from; the default is this machine."""
        self._system = system

    def probe(self, environ: Mapping[str, str]) -> Probe:
        """Moore Threads devices in MUSA's order. Initialises no MUSA runtime.

        Raises:
            VisibilityError: a shortened UUID in ``MUSA_VISIBLE_DEVICES`` fits several GPUs.
        """
        from hal_musa._probe import probe
        from hal_musa._system import System

        return probe(environ, self._system or System())

    def parse_arch(self, text: str) -> Arch:
        """``mp_31``, ``mp31``, ``31``, ``3.1``, ``(3, 1)``: all name ``mp_31``.

        Raises:
            ValueError: ``text`` has none of these forms.
        """
        from hal_musa._arch import parse_arch

        return parse_arch(text)

    def capabilities(self, arch: Arch) -> frozenset[str]:
        """What devices of ``arch`` can do. Empty for one that is not known."""
        from hal_musa._capabilities import capabilities

        return capabilities(arch)

    def simulate(self, device: Device) -> Device:
        """Name, memory and multiprocessors of the product that ``device`` names, or of its arch's usual one."""
        from hal_musa._products import complete

        return complete(device)

    def libraries(self) -> Iterable[Library]:
        """Libraries that Moore Threads' kernels come from."""
        from hal_musa._libraries import LIBRARIES

        return LIBRARIES

    def kernels(self) -> Iterable[Kernel]:
        """Kernels of MATE and torch_musa, as declarations; neither is imported."""
        return _KERNELS

    def errata(self) -> Iterable[Erratum]:
        """Known-bad combinations, from ``errata.json``."""
        from hal import load_errata

        return load_errata(Path(__file__).with_name("errata.json"))
