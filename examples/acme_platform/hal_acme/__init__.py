"""Acme accelerators for ``hal``: a whole platform, brought from outside. Importing it imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import hal
import hal_ops
from hal_acme import _arch, _errata, _kernels, _probe
from hal_acme.ops.logit_softcap import LOGIT_SOFTCAP

__all__ = ["AcmePlatform"]


class AcmePlatform(hal.Platform):
    """Devices named acme1, acme2, ...: their probe, their kernels, and an op that nobody else has."""

    name = "acme"
    vendor = "Acme"
    api = 1
    torch_type = "cpu"
    runtime_name = "acmert"
    visibility = (_probe.VARIABLE,)

    def probe(self, environ: Mapping[str, str]) -> hal.Probe:
        """The devices of the file that ``ACME_DEVICES_FILE`` names."""
        return _probe.probe(environ)

    def parse_arch(self, text: str) -> hal.Arch:
        """``acme2``, or ``acme2+mx`` with features.

        Raises:
            ValueError: ``text`` has another form.
        """
        return _arch.parse_arch(text)

    def capabilities(self, arch: hal.Arch) -> frozenset[str]:
        """What devices of ``arch`` can do."""
        return _arch.capabilities(arch)

    def simulate(self, device: hal.Device) -> hal.Device:
        """A simulated device gets its product's memory and the current runtime."""
        return _probe.complete(device)

    def ops(self) -> Iterable[hal_ops.Op]:
        """The op that we add."""
        return (LOGIT_SOFTCAP,)

    def kernels(self) -> Iterable[hal.Kernel]:
        """Declarations only; the code is imported when a kernel is chosen."""
        return _kernels.KERNELS

    def errata(self) -> Iterable[hal.Erratum]:
        """What is known to be wrong with our hardware."""
        return _errata.ERRATA
