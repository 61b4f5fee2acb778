"""Adding or removing one vendor's distribution changes no row of another vendor."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hal
from hal import _plugins
from hal._libraries import normalize
from hal._simulate import known_libraries
from hal.testing import decision_matrix
from hal_musa import MusaPlatform

VENDORS = ("musa", "nvidia", "rocm")
LIBRARIES = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "torch_musa": "2.11.0",
    "mate": "0.2.2",
    "amd-aiter": "0.1.20",
    "flash-attn": "2.8.3",
    "flash-attn-3": "3.0.0",
    "flash-attn-4": "4.0.0b36",
    "flashinfer-python": "0.6.13",
    "nvidia-cutlass-dsl": "4.8.0",
}
"""All that any vendor's kernels look for, at once: what one vendor has must not reach another's devices."""

Rows = dict[str, dict[str, Any]]


@functools.cache
def golden() -> ModuleType:
    """The golden matrix: its devices and requests."""
    path = Path(__file__).with_name("test_matrix.py")
    spec = importlib.util.spec_from_file_location("hal_golden_matrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def devices(but: str) -> list[str]:
    """One device of each arch that is named anywhere, of all vendors but one; and what only newer runtimes admit."""
    found = [*golden().DEVICES, "musa:mp_31,musa=5.2", "nvidia:sm_90,cuda=13.0,driver=580.65", "rocm:gfx942,hip=7.0"]
    return [d for d in dict.fromkeys(found) if d.partition(":")[0] != but]


def rows(but: str) -> Rows:
    """Kernels, and who else would do, for each device that is not of the vendor ``but``."""
    chosen = {n: r for i, (n, r) in enumerate(golden().requests().items()) if i % 3 == 0 or "GPT-OSS" in n}
    known = known_libraries(_plugins.registry())
    with hal.simulate(libraries={name: v for name, v in LIBRARIES.items() if normalize(name) in known}):
        return decision_matrix(devices(but), chosen)


@pytest.mark.parametrize("vendor", VENDORS)
def test_removing_a_vendor_changes_no_row_of_another(vendor: str) -> None:
    # requirement C2
    everything = rows(vendor)
    with hal.override(plugins=[f"-{vendor}"]):
        assert vendor not in _plugins.registry().platforms
        without = rows(vendor)
    changed = {
        f"{device} | {request}: {everything[device][request]} -> {cell}"
        for device, row in without.items()
        for request, cell in row.items()
        if everything[device][request] != cell
    }
    assert not changed
    assert everything.keys() == without.keys()


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_alone_decides_for_its_devices_as_it_does_among_others(vendor: str) -> None:
    # requirement C2
    mine = [d for d in devices("") if d.startswith(f"{vendor}:")]
    request = {"llama": golden().requests()["speculative"]}
    with hal.simulate(libraries=LIBRARIES):
        among = decision_matrix(mine, request)
        with hal.override(plugins=[f"-{other}" for other in VENDORS if other != vendor]):
            alone = decision_matrix(mine, request)
    assert alone == among


def test_a_row_that_depends_on_another_vendor_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = MusaPlatform.kernels

    def for_everybody(self: MusaPlatform) -> list[hal.Kernel]:
        return [dataclasses.replace(k, platforms={}, needs=(), runtime="", check=None) for k in kept(self)]

    monkeypatch.setattr(MusaPlatform, "kernels", for_everybody)
    _plugins.forget()
    try:
        with pytest.raises(AssertionError, match=r"mate\.prefill"):
            test_removing_a_vendor_changes_no_row_of_another("musa")
    finally:
        monkeypatch.undo()
        _plugins.forget()
