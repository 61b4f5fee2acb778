"""Directives that write tables from the code: settings, platforms, ops, kernels, and the fields of a kernel.

Each is a Markdown table of what the settings and the registry declare, so it cannot be out of date.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hal import _plugins
from hal._kernel import Kernel, describe_fields
from hal._registry import Registry
from hal._settings import SETTINGS
from hal_ops import Op

__all__ = ["setup"]

Table = tuple[Sequence[str], Iterable[Sequence[str]]]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    tables: dict[str, Callable[..., Table]] = {
        "hal-settings": _settings,
        "hal-platforms": _platforms,
        "hal-ops": _ops,
        "hal-kernels": _kernels,
        "hal-fields": _fields,
    }
    for name, make in tables.items():
        app.add_directive(name, _directive(make))
    return {"parallel_read_safe": True}


def _directive(make: Callable[..., Table]) -> type[SphinxDirective]:
    class TableDirective(SphinxDirective):
        """One table; an argument names the op or the kernel that it is about. No argument means all."""

        optional_arguments = 1

        def run(self) -> list[nodes.Node]:
            return self.parse_text_to_nodes(_markdown(*make(*self.arguments)))

    return TableDirective


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def _settings() -> Table:
    rows = [(f"`{s.name}`", s.values, _default(s.default), s.help) for s in SETTINGS]
    rows.append(("`HAL_OP_<NAME>`", "a name of `hal kernels`", "none", "kernel or library to force for that op"))
    return ("variable", "takes", "default", "what it does"), sorted(rows)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "`1`" if value else "`0`"
    return "none" if value in (None, ()) else f"`{value}`"


def _ops() -> Table:
    rows = [(f"`{op.name}`", op.summary, _signature(op)) for _, op in sorted(_plugins.registry().ops.items())]
    return ("op", "what it computes", "fields of its request"), rows


def _signature(op: Op) -> str:
    fields = [f for f in dataclasses.fields(op.request) if f.name in op.request.rules()]
    bare = [f.name for f in fields if f.default is dataclasses.MISSING]
    rest = [f.name for f in fields if f.name not in bare]
    return ", ".join([*(f"**{name}**" for name in bare), *rest])


def _kernels(*names: str) -> Table:
    registry = _plugins.registry()
    ops = [registry.op(name) for name in names or sorted(registry.ops)]
    rows = [_row(k, registry) for op in ops for phase in op.phases for k in registry.candidates(op.name, phase)]
    return ("kernel", "from", "priority", "runs on", "needs", "evidence"), rows


def _row(kernel: Kernel, registry: Registry) -> tuple[str, ...]:
    places = [f"{p} {archs.words()}".removesuffix(" any") for p, archs in kernel.platforms.items()]
    needs = [f"{n.library} {n.versions}".strip() for n in kernel.needs]
    needs += [f"{name} {wanted}" for name, wanted in (("runtime", kernel.runtime), ("driver", kernel.driver)) if wanted]
    evidence = [f"{word}: {'every device' if arch == '*' else arch}" for arch, word in kernel.evidence.items()]
    evidence += [f"{word} with {field}" for field, word in kernel.evidence_with.items()]
    return (
        f"`{kernel.name}`",
        registry.sources[f"kernel:{kernel.name}"].distribution,
        f"{kernel.band.name.lower()} {int(kernel.priority)}",
        ", ".join(places) or "any device",
        ", ".join([*needs, *sorted(kernel.capabilities)]) or "nothing",
        ", ".join(evidence) or "claimed",
    )


def _fields(name: str) -> Table:
    fields = describe_fields(_plugins.registry().kernels[name])
    return ("field of the request", "allowed"), [(f"`{field}`", words) for field, words in fields.items()]


def _platforms() -> Table:
    registry = _plugins.registry()
    rows = []
    for name, platform in sorted(registry.platforms.items()):
        own = sum(name in k.platforms for k in registry.kernels.values())
        variables = ", ".join(f"`{v}`" for v in platform.visibility) or "none"
        rows.append((f"`{name}`", registry.sources[f"platform:{name}"].distribution, variables, str(own)))
    return ("platform", "distribution", "variables that hide devices", "kernels for it alone"), rows
