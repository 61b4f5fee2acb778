"""What the wheels hold, and what they ask for."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import pytest

import hal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VENDORS = ("nvidia", "rocm", "musa")
PACKAGES = {
    "torch-hal": {"hal": ROOT / "hal", "hal_ops": ROOT / "ops/hal_ops"},
    **{f"torch-hal-{v}": {f"hal_{v}": ROOT / f"platforms/{v}/hal_{v}"} for v in VENDORS},
    "torch-hal-acme": {"hal_acme": ROOT / "examples/acme_platform/hal_acme"},
}


def entry_points(wheel: Any) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read("entry_points.txt"))
    return {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_wheel_holds_its_packages_whole_and_nothing_else(wheels: dict[str, Any], name: str) -> None:
    packages = PACKAGES[name]
    assert wheels[name].tops() == set(packages)
    for package, folder in packages.items():
        files = {p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        wanted = {f"{package}/{p.relative_to(folder).as_posix()}" for p in files}
        held = {n for n in wheels[name].names() if n.startswith(f"{package}/")}
        assert held == wanted
        assert f"{package}/py.typed" in held


@pytest.mark.parametrize("name", [n for n in PACKAGES if n != "torch-hal-acme"])
def test_a_wheel_carries_its_licence_and_its_description(wheels: dict[str, Any], name: str) -> None:
    metadata = wheels[name].metadata()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(n.endswith("/LICENSE") for n in wheels[name].names())
    assert len(metadata.get_payload()) > 200
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_core_needs_no_vendor_and_no_torch(wheels: dict[str, Any]) -> None:
    # requirement C10
    assert wheels["torch-hal"].requirements() <= {"click", "packaging", "rich", "tomli"}


def test_vendors_are_extras_of_the_core(wheels: dict[str, Any]) -> None:
    # requirement C10
    core = wheels["torch-hal"]
    for vendor in VENDORS:
        assert core.requirements(extra=vendor) == {f"torch-hal-{vendor}"}
    assert core.requirements(extra="torch") == {"torch"}


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_needs_the_core_and_no_kernel_library(wheels: dict[str, Any], vendor: str) -> None:
    # requirement C10, B11
    tools = {"nvidia": {"nvidia-ml-py"}, "rocm": set(), "musa": set()}
    assert wheels[f"torch-hal-{vendor}"].requirements() == {"torch-hal", *tools[vendor]}


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_accepts_the_core_that_it_is_built_beside(wheels: dict[str, Any], vendor: str) -> None:
    from packaging.requirements import Requirement

    texts = wheels[f"torch-hal-{vendor}"].metadata().get_all("Requires-Dist")
    (core,) = [r for r in map(Requirement, texts) if r.name == "torch-hal"]
    assert core.specifier.contains(hal.__version__)


def test_versions_agree(wheels: dict[str, Any]) -> None:
    assert wheels["torch-hal"].metadata()["Version"] == hal.__version__


def test_entry_points(wheels: dict[str, Any]) -> None:
    core = entry_points(wheels["torch-hal"])
    assert set(core["hal.platforms"]) == {"cpu", "portable"}
    assert set(core["console_scripts"]) == {"hal"}
    for vendor in (*VENDORS, "acme"):
        assert set(entry_points(wheels[f"torch-hal-{vendor}"])["hal.platforms"]) == {vendor}
