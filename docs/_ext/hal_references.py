"""Cross-references that Sphinx cannot resolve alone, without an inventory from the network.

What autodoc prints of an annotation is where an object was defined (``hal._device.Device``); readers know it by its
public name (``hal.Device``). Names of other projects become plain text, provided that they exist. A name that is
neither stays unresolved, and the build fails on it: there is no list of exceptions.
"""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PUBLIC = (
    "hal",
    "hal.errors",
    "hal.testing",
    "hal_ops",
    "hal_ops.attention",
    "hal_ops.kv_cache",
    "hal_ops.merge_states",
)
"""Modules whose names are documented, in the order in which a bare name is looked up."""

ELSEWHERE = ("builtins", "torch", "hal._plan", "hal._planner", "hal_ops.case", "hal_ops.compare")
"""Where bare names come from that annotations only import for type checkers."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Have the last word on references that nothing else resolves."""
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    name = target.rpartition(".")[2]
    if target.startswith(("hal.", "hal_ops.")) or "." not in target:
        found = _public(app, env, node, contnode, name)
        if found is not None:
            return found
    spelled = [target] if "." in target else [f"{module}.{target}" for module in ELSEWHERE]
    return nodes.inline("", "", contnode) if any(map(exists, spelled)) else None


def _public(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement, name: str
) -> nodes.Node | None:
    domain = env.domains["py"]
    known = domain.data["objects"]
    for module in PUBLIC:
        if f"{module}.{name}" in known:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, contnode)
    return None


def exists(dotted: str) -> bool:
    """Whether ``package.module.attribute`` can be imported."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found is not None
    return False
