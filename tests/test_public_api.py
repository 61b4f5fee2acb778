"""What is public: named once, sorted, typed, documented."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hal
import hal_ops
from hal import errors


def public_modules(package: ModuleType) -> list[str]:
    found = [package.__name__]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            found.append(info.name)
    return found


def checked_block() -> dict[str, str]:
    """Name to module, of what ``hal/__init__.py`` imports for type checkers."""
    tree = ast.parse(Path(hal.__file__).read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If)]
    assert len(blocks) == 1
    found = {}
    for node in blocks[0].body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.name == alias.asname, (
                f"{alias.name}: write 'import {alias.name} as {alias.name}' to re-export it"
            )
            found[alias.name] = (node.module or "").removeprefix("hal").removeprefix(".")
    return found


def test_names_are_sorted_and_each_is_there_once() -> None:
    for module in (hal, hal_ops, errors):
        assert list(module.__all__) == sorted(set(module.__all__)), module.__name__
    assert list(hal._EXPORTS) == sorted(hal._EXPORTS)


def test_the_three_lists_agree() -> None:
    modules = {"errors", "testing"}
    assert set(hal.__all__) == set(hal._EXPORTS) | modules
    assert checked_block() == {**hal._EXPORTS, **dict.fromkeys(modules, "")}


@pytest.mark.parametrize("name", hal.__all__)
def test_every_name_is_there_and_is_where_it_is_said_to_be(name: str) -> None:
    value = getattr(hal, name)
    if name in hal._EXPORTS:
        home = importlib.import_module(f"hal.{hal._EXPORTS[name]}")
        assert value is getattr(home, name)
        assert name in home.__all__
    assert name in dir(hal)


def test_what_is_public_but_not_listed_is_a_module() -> None:
    stray = [
        n for n in vars(hal) if not n.startswith("_") and n not in hal.__all__ and not inspect.ismodule(getattr(hal, n))
    ]
    assert sorted(stray) == ["Any", "TYPE_CHECKING", "annotations"]


def test_an_unknown_name_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'hal' has no attribute 'get_atention'"):
        hal.get_atention  # noqa: B018


def own_doc(value: Any) -> str:
    """The docstring, unless it is the one that dataclasses make up."""
    doc = inspect.getdoc(value) or ""
    made_up = dataclasses.is_dataclass(value) and doc.startswith(f"{getattr(value, '__name__', '')}(")
    return "" if made_up else doc


def undocumented(name: str, value: Any) -> list[str]:
    if not (inspect.isclass(value) or callable(value)):
        return []
    missing = [] if own_doc(value) else [name]
    if inspect.isclass(value) and value.__module__.startswith("hal"):
        members = {n: m for n, m in vars(value).items() if not n.startswith("_")}
        documented = (property, staticmethod, classmethod)
        missing += [
            f"{name}.{n}"
            for n, m in members.items()
            if (inspect.isfunction(m) or isinstance(m, documented)) and not inspect.getdoc(getattr(value, n))
        ]
    return missing


@pytest.mark.parametrize("package", [hal, hal_ops], ids=lambda m: m.__name__)
def test_everything_public_says_what_it_is(package: ModuleType) -> None:
    pytest.importorskip("torch")
    missing = []
    for module_name in public_modules(package):
        module = importlib.import_module(module_name)
        missing += [] if (module.__doc__ or "").strip() else [module_name]
        names = getattr(module, "__all__", ())
        missing += [text for n in names for text in undocumented(f"{module_name}.{n}", getattr(module, n))]
    assert not missing, "\n".join(["", *missing])


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n.endswith("Error")])
def test_errors_are_ours_and_say_when_they_are_raised(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.HalError)
    assert own_doc(error).endswith(".")
    assert name in (errors.__doc__ or ""), "the tree in the module's docstring lacks it"


def test_the_version_is_that_of_the_distribution() -> None:
    import importlib.metadata

    assert hal.__version__ == importlib.metadata.version("torch-hal")
