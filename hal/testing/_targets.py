"""Kernels' targets: whether what a declaration points at is there, looked at without importing vendor libraries."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from hal._bind import classify
from hal._kernel import Kernel
from hal._libraries import installed
from hal.testing._plugin_checks import Finding, Plugin
from hal_ops import resolve_target

__all__ = ["targets"]


def targets(plugin: Plugin) -> Finding:
    """Each target exists and takes (request, device); no function of its module swallows keywords.

    Where a kernel's libraries are installed the target is imported. Where they are not, its source is read.
    """
    found = Finding()
    for kernel in plugin.platform().kernels():
        missing = [n.library for n in kernel.needs if not any(installed(d) for d in n.names())]
        problems = _in_source(kernel) if missing else _imported(kernel)
        found.problems += [f"{kernel.name}: {problem}" for problem in problems]
        if missing:
            lacking = ", ".join(missing)
            found.notes.append(f"{kernel.name}: {lacking} is not installed; {kernel.target} was read, not imported")
    return found


def _imported(kernel: Kernel) -> list[str]:
    try:
        factory = resolve_target(kernel.target)
    except ImportError as error:
        return [f"{kernel.target} cannot be imported, though all it needs is installed: {classify(error)}: {error}"]
    except AttributeError as error:
        return [f"{kernel.target}: {error}"]
    return [*_signature(kernel.target, factory), *_in_source(kernel)]


def _signature(target: str, factory: Any) -> list[str]:
    if not callable(factory):
        return [f"{target} is {factory!r}: give a function that takes (request, device)"]
    try:
        inspect.signature(factory).bind("request", "device")
    except TypeError as error:
        return [f"{target} must take (request, device): {error}"]
    return []


def _in_source(kernel: Kernel) -> list[str]:
    module, _, attribute = kernel.target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        return [f"the package of {module} cannot be imported: {classify(error)}: {error}"]
    if spec is None:
        return [f"there is no module {module}"]
    if spec.origin is None or not spec.origin.endswith(".py"):
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"), spec.origin)
    problems = [] if attribute.partition(".")[0] in _names(tree) else [f"{module} has no {attribute!r}"]
    return [*problems, *(f"{module}.{name} takes **{star} and drops it" for name, star in swallowed_keywords(tree))]


def _names(tree: ast.Module) -> set[str]:
    """Names bound at the top of a module, also inside ``if`` and ``try``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def swallowed_keywords(tree: ast.AST) -> list[tuple[str, str]]:
    """Functions that take ``**keywords`` and never look at them: an argument given there would be dropped."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg is not None:
            star = node.args.kwarg.arg
            if not any(isinstance(n, ast.Name) and n.id == star for n in ast.walk(node)):
                found.append((node.name, star))
    return found
