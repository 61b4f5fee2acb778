"""Conformance: what a vendor runs on its own plugin, without HAL's repository."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hal import _plugins
from hal._device import Device
from hal._platform import Platform
from hal.testing import _plugin_checks as checks
from hal.testing._plugin_checks import Plugin, load
from hal.testing._targets import targets
from hal.testing._values import values
from hal.testing._wins import wins

__all__ = ["Check", "ConformanceReport", "PluginConformance", "conformance"]

CHECKS = ("contract", "declarations", "imports", "probe", "archs", "samples", "targets", "wins", "values")


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise of the contract: ``status`` is ``"passed"``, ``"failed"`` or ``"skipped"``, with what was found."""

    name: str
    promise: str
    status: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.status:8}{self.name}: {self.promise}"]
        lines += [f"        - {line}" for text in self.problems for line in text.splitlines()]
        lines += [f"        ({note})" for note in self.notes]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ConformanceReport:
    """What :func:`conformance` found about one plugin."""

    platform: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures()

    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.status == "failed")

    def __str__(self) -> str:
        verdict = "conforms" if self.ok else f"breaks {len(self.failures())} of {len(self.checks)} promises"
        return "\n".join([f"platform {self.platform!r} {verdict}", *map(str, self.checks)])


def conformance(
    platform: type[Platform] | str, *, devices: Sequence[str | Device] = (), limit: int | None = 16
) -> ConformanceReport:
    """Hold a plugin against everything that HAL's plugin contract says. Needs no hardware; uses it where it is.

    Args:
        platform: the class, or the name of an installed plugin.
        devices: simulated devices on which each kernel must win at least once (texts of ``hal.simulate``, or ``Device``
            objects); default: one of each arch that the kernels name.
        limit: corners run a kernel, where this machine has a device of the platform; None runs all.

    Raises:
        PluginError: no installed plugin of that name, or it does not load.
    """
    plugin = load(platform)
    results: list[Check] = []
    for name in CHECKS:
        broken = [c.name for c in results if c.status == "failed" and c.name in ("contract", "declarations")]
        if broken:
            results.append(Check(name, _promise(name), "skipped", notes=(f"{broken[0]} failed",)))
        else:
            results.append(_run(name, plugin, devices, limit))
    return ConformanceReport(plugin.cls.name, tuple(results))


def _run(name: str, plugin: Plugin, devices: Sequence[str | Device], limit: int | None) -> Check:
    with plugged_in(plugin) if name in ("wins", "values") else contextlib.nullcontext():
        found = _function(name)(plugin, *{"wins": (devices,), "values": (limit,)}.get(name, ()))
    status = "failed" if found.problems else "passed" if found.ran else "skipped"
    return Check(name, _promise(name), status, tuple(found.problems), tuple(found.notes))


def _function(name: str) -> Any:
    own = {"targets": targets, "wins": wins, "values": values}
    return own.get(name) or getattr(checks, name)


def _promise(name: str) -> str:
    return str(_function(name).__doc__).strip().splitlines()[0]


@contextlib.contextmanager
def plugged_in(plugin: Plugin) -> Iterator[None]:
    """The plugin among the others: as it is installed, or for the time being."""
    if plugin.cls.name in _plugins.registry().platforms:
        yield
        return
    with _plugins.temporary_plugin(plugin.cls.name, plugin.cls):
        yield


class PluginConformance:
    """The same as tests: ``class TestAcme(hal.testing.PluginConformance): platform = AcmePlatform``, and run pytest.

    ``platform`` is the class or an installed plugin's name; ``devices`` and ``limit`` are those of :func:`conformance`.
    """

    platform: ClassVar[type[Platform] | str]
    devices: ClassVar[Sequence[str | Device]] = ()
    limit: ClassVar[int | None] = 16

    def _hold(self, name: str) -> None:
        check = _run(name, load(self.platform), self.devices, self.limit)
        if check.status == "skipped":
            import pytest

            pytest.skip("; ".join(check.notes))
        assert check.status == "passed", f"\n{check}"

    def test_contract(self) -> None:
        """The class attributes are whole."""
        self._hold("contract")

    def test_declarations(self) -> None:
        """Kernels, ops, libraries and errata are declared rightly."""
        self._hold("declarations")

    def test_imports(self) -> None:
        """Importing the plugin leaves no trace."""
        self._hold("imports")

    def test_probe(self) -> None:
        """The probe works without the hardware."""
        self._hold("probe")

    def test_archs(self) -> None:
        """Archs parse, and parse back."""
        self._hold("archs")

    def test_samples(self) -> None:
        """Every declared feature can be tested."""
        self._hold("samples")

    def test_targets(self) -> None:
        """Every kernel's code is where it is said to be."""
        self._hold("targets")

    def test_wins(self) -> None:
        """Every kernel is chosen somewhere."""
        self._hold("wins")

    def test_values(self) -> None:
        """Every kernel that runs here computes the right thing."""
        self._hold("values")
