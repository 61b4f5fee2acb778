"""``hal kernels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from hal.cli._render import heading, json_option, print_json, table

__all__ = ["command"]


@click.command("kernels")
@json_option
@click.option("--op", metavar="OP", help="Only the kernels of this op.")
@click.option("-v", "--verbose", is_flag=True, help="Show which values of a request each kernel allows.")
def command(as_json: bool, op: str | None, verbose: bool) -> None:
    """List every kernel that is registered, best first: what it is for, and what it needs."""
    rows = _facts(op)
    if as_json:
        print_json({"kernels": rows})
    elif verbose:
        _show_fields(rows)
    else:
        _show(rows)


def _facts(op: str | None) -> list[dict[str, Any]]:
    from hal import _plugins
    from hal.errors import UnknownOpError

    registry = _plugins.registry()
    try:
        ops = [registry.op(op)] if op else [registry.ops[name] for name in sorted(registry.ops)]
    except UnknownOpError as error:
        raise click.BadParameter(str(error), param_hint="'--op'") from error
    return [
        _kernel(kernel, registry.sources[f"kernel:{kernel.name}"])
        for o in ops
        for phase in o.phases
        for kernel in registry.candidates(o.name, phase)
    ]


def _kernel(kernel: Any, source: Any) -> dict[str, Any]:
    from hal._kernel import describe_fields

    return {
        "name": kernel.name,
        "op": kernel.op,
        "phase": kernel.phase,
        "library": kernel.library,
        "band": kernel.band.name.lower(),
        "priority": kernel.priority,
        "priorities": dict(kernel.priorities),
        "platforms": {name: archs.words() for name, archs in kernel.platforms.items()},
        "needs": [_need(n) for n in kernel.needs],
        "runtime": kernel.runtime,
        "driver": kernel.driver,
        "capabilities": sorted(kernel.capabilities),
        "evidence": dict(kernel.evidence),
        "evidence_with": dict(kernel.evidence_with),
        "copies": kernel.copies,
        "copies_with": dict(kernel.copies_with),
        "row_alignment": kernel.row_alignment,
        "note": kernel.note,
        "plugin": source.plugin,
        "distribution": source.distribution,
        "version": source.version,
        "fields": describe_fields(kernel),
    }


def _need(needs: Any) -> dict[str, Any]:
    return {"library": needs.library, "versions": needs.versions, "install": needs.install, "because": needs.because}


def _show(rows: Sequence[dict[str, Any]]) -> None:
    headers = ("phase", "kernel", "priority", "runs on", "needs", "evidence", "from")
    for i, op in enumerate(dict.fromkeys(r["op"] for r in rows)):
        heading(op, first=i == 0)
        table(headers, [_row(r) for r in rows if r["op"] == op])


def _row(r: dict[str, Any]) -> tuple[Any, ...]:
    places = [p if archs == "any" else f"{p} {archs}" for p, archs in r["platforms"].items()]
    return (
        r["phase"],
        r["name"],
        f"{r['band']} {r['priority']}",
        places or "any device",
        _needs(r) or "-",
        _evidence(r),
        f"{r['distribution']} {r['version']}",
    )


def _needs(r: dict[str, Any]) -> list[str]:
    texts = [f"{n['library']} {n['versions']}".strip() for n in r["needs"]]
    texts += [f"{name} {r[name]}" for name in ("runtime", "driver") if r[name]]
    return texts + [f"capability {name}" for name in r["capabilities"]]


def _evidence(r: dict[str, Any]) -> list[str]:
    """``run on sm_90``, ``compiled for sm_80, sm_89``, ``emulated with sinks``; what is not listed is only claimed."""
    words: dict[str, list[str]] = {}
    for arch, word in r["evidence"].items():
        rest = "every other device" if len(r["evidence"]) > 1 else "every device"
        words.setdefault(word, []).append(rest if arch == "*" else arch)
    texts = [f"{word} {'on' if word == 'run' else 'for'} {', '.join(archs)}" for word, archs in words.items()]
    fields: dict[str, list[str]] = {}
    for field, word in r["evidence_with"].items():
        fields.setdefault(word, []).append(field)
    return [*(texts or ["claimed"]), *(f"{word} with {', '.join(names)}" for word, names in fields.items())]


def _show_fields(rows: Sequence[dict[str, Any]]) -> None:
    for i, r in enumerate(rows):
        heading(f"{r['name']}  ({r['op']} {r['phase']}, {r['band']} {r['priority']})", first=i == 0)
        *_, places, needs, evidence, source = _row(r)
        copies = [r["copies"], *(f"with {field}: {tensors}" for field, tensors in r["copies_with"].items())]
        begin = "" if r["row_alignment"] == 1 else f"begin at multiples of {r['row_alignment']} bytes"
        facts = [("note", r["note"]), ("copies", [c for c in copies if c]), ("rows", begin), ("runs on", places)]
        facts += [("needs", needs), ("evidence", evidence), ("from", source)]
        table(("about it", ""), [(name, value) for name, value in facts if value])
        click.echo()
        table(("field of the request", "allowed"), r["fields"].items())
