"""Imports point one way: ``hal_ops`` <- ``hal`` <- ``hal_<vendor>``; vendors use what is public."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import hal
import hal.errors

ROOT = Path(__file__).resolve().parents[1]
VENDORS = {path.name: path for path in sorted(ROOT.glob("platforms/*/hal_*")) if path.is_dir()}
VENDORS["hal_acme"] = ROOT / "examples/acme_platform/hal_acme"
PACKAGES = {"hal": ROOT / "hal", "hal_ops": ROOT / "ops/hal_ops", **VENDORS}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module, with the names taken from it; ``lazy`` is inside a function or for type checkers only."""

    module: str
    names: tuple[str, ...]
    where: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@functools.cache
def imports(package: str) -> tuple[Import, ...]:
    found: list[Import] = []
    for path in sorted(PACKAGES[package].rglob("*.py")):
        found += _imports(path)
    assert found, f"no import found in {package}: is the path right?"
    return tuple(found)


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(n) for outer in ast.walk(tree) if _defers(outer) for n in ast.walk(outer)}
    for node in ast.walk(tree):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), where, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: relative import"
            yield Import(node.module or "", tuple(a.name for a in node.names), where, id(node) in lazy)


def _defers(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return True
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(found: Import) -> bool:
    return found.top == "hal" or found.top.startswith("hal_")


def test_ops_import_nothing_of_ours_but_themselves() -> None:
    assert [i.where for i in imports("hal_ops") if ours(i) and i.top != "hal_ops"] == []


def test_the_core_imports_no_vendor() -> None:
    assert [i.where for i in imports("hal") if ours(i) and i.top not in ("hal", "hal_ops")] == []


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_imports_no_other_vendor(vendor: str) -> None:
    # requirement C2
    assert [i.where for i in imports(vendor) if ours(i) and i.top not in ("hal", "hal_ops", vendor)] == []


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_uses_what_is_public(vendor: str) -> None:
    # requirement X10
    wrong = []
    for found in (i for i in imports(vendor) if i.top in ("hal", "hal_ops")):
        if any(part.startswith("_") for part in (*found.module.split("."), *found.names)):
            wrong.append(f"{found.where}: {found.module} {', '.join(found.names)}")
        elif found.module == "hal":
            wrong += [f"{found.where}: hal.{n}" for n in found.names if n not in hal.__all__]
        elif found.module == "hal.errors":
            wrong += [f"{found.where}: hal.errors.{n}" for n in found.names if n not in hal.errors.__all__]
    assert not wrong, "\n".join(["", *wrong])


def test_the_core_uses_what_is_public_of_the_ops() -> None:
    of_ops = [i for i in imports("hal") if i.top == "hal_ops"]
    private = [i.where for i in of_ops if any(p.startswith("_") for p in (*i.module.split("."), *i.names))]
    assert private == []


@functools.cache
def modules() -> dict[str, tuple[Import, ...]]:
    """Every module of ours, with what importing it imports at once."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = tuple(i for i in _imports(path) if not i.lazy)
    return found


def taken_along(start: list[str]) -> dict[str, str]:
    """All that importing some modules imports: module to the place of the import."""
    seen: dict[str, str] = {}
    pending = [(name, "") for name in start]
    while pending:
        name, where = pending.pop()
        if name not in seen:
            seen[name] = where
            for found in modules().get(name, ()):
                names = [found.module, *(f"{found.module}.{n}" for n in found.names)]
                pending += [(n, found.where) for n in names if n in modules() or n == found.module]
    return seen


@pytest.mark.parametrize("package", ["hal", "hal_ops", *VENDORS])
def test_a_package_takes_no_heavy_library_along(package: str) -> None:
    # requirement X8, P40
    start = [name for name in modules() if name.partition(".")[0] == "hal"] if package == "hal" else [package]
    taken = taken_along(start)
    assert len(taken) > 5
    assert {n: where for n, where in taken.items() if n.partition(".")[0] in ("torch", "triton", "numpy")} == {}


def test_the_search_finds_what_it_is_for() -> None:
    assert "torch" in taken_along(["hal_acme.attention"])
