"""``hal doctor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from hal.cli._devices import show_devices, show_evidence
from hal.cli._machine import machine, machine_options
from hal.cli._progress import needs_torch, progress
from hal.cli._render import heading, json_option, line, print_json, table
from hal.errors import DeviceError

__all__ = ["command"]

Facts = Mapping[str, Any]


@click.command("doctor")
@machine_options
@click.option("--run", is_flag=True, help="Also import and make the kernels chosen, each in a process of its own.")
@json_option
@click.pass_context
def command(ctx: click.Context, device: str | None, libraries: Sequence[str], run: bool, as_json: bool) -> None:
    """Show what is installed, what was found, what would be chosen for well-known models, and how to do better.

    Without --run nothing but plugins is imported, and no device is touched. Exits with 1 if something is wrong.
    """
    from hal.cli._report import report

    named, trouble = _device(device)
    with machine(named, libraries) as found:
        facts = report(found, trouble)
        if run:
            _run(facts, found, supposed=bool(libraries))
        if as_json:
            print_json(facts)
        else:
            _show(facts)
    if facts["problems"]:
        ctx.exit(1)


def _device(device: str | None) -> tuple[str | None, list[str]]:
    """The device to answer for, and what is wrong: where none can be the default, the first one stands in for it."""
    from hal import _devices

    if device is not None:
        return device, []
    try:
        return _devices.device().id, []
    except DeviceError as error:
        found = _devices.devices()
        if not found:
            raise
        return found[0].id, [str(error).partition(" What each probe saw")[0]]


def _run(facts: dict[str, Any], device: Any, *, supposed: bool) -> None:
    """Add what came of making the chosen kernels; failures are problems."""
    if device.simulated or supposed:
        raise click.UsageError("--run makes kernels here: it needs a real device and what is really installed")
    needs_torch("doctor --run")
    from hal.cli._smoke import try_kernels

    wanted = {kernel: d["request"] for d in facts["decisions"] for kernel in d["kernels"].values() if kernel}
    with progress() as say:
        facts["run"] = try_kernels(wanted, device.id, say)
    facts["problems"] += [f"{row['kernel']} could not be made: {row['error']}" for row in facts["run"] if row["error"]]


def _show(facts: Facts) -> None:
    heading("versions", first=True)
    _versions(facts["versions"])
    heading("plugins")
    _plugins(facts["plugins"])
    heading(f"devices (default: {facts['default_device']})")
    _devices()
    heading(f"libraries, for {facts['default_device']}")
    _libraries(facts["libraries"])
    heading("errata in force")
    _errata(facts["errata"])
    heading("verified on this machine")
    _ledger(facts["ledger"])
    heading(f"what well-known models would get on {facts['default_device']}")
    _decisions(facts["decisions"])
    if "run" in facts:
        heading("made, each in a process of its own")
        table(("kernel", "outcome"), [(row["kernel"], row["error"] or "made") for row in facts["run"]])
    heading("what to install to do better")
    _advice(facts["advice"])
    heading("problems")
    for problem in facts["problems"] or ["none"]:
        line(problem)


def _versions(versions: Facts) -> None:
    rows = [(name, text) for name, text in versions.items() if isinstance(text, str)]
    built = [f"{name} {version}" for name, version in versions["torch_build"].items() if version]
    if versions["torch"] != "not installed":
        shown = " ".join(built) or "the CPU alone"
        rows = [(n, f"{t}, built for {shown}" if n == "torch" else t) for n, t in rows]
    table(("what", "version"), rows)


def _plugins(plugins: Sequence[Facts]) -> None:
    rows = [(p["name"], f"{p['distribution']} {p['version']}", p["status"], p["error"] or "-") for p in plugins]
    table(("plugin", "from", "status", "error"), rows)


def _devices() -> None:
    from hal import devices, probe_report

    show_devices(devices(), indent=2)
    click.echo()
    show_evidence(probe_report(), indent=2)


def _libraries(libraries: Sequence[Facts]) -> None:
    if not libraries:
        line("could not be judged; see the problems below")
        return
    shown = [lib for lib in libraries if lib["installed"] or lib["kernels"]]
    table(("library", "installed", "usable for", "why not more"), [_library(lib) for lib in shown])


def _library(lib: Facts) -> tuple[Any, ...]:
    versions = list(lib["installed"].values())
    usable = _grouped(lib["usable"]) if lib["usable"] else "nothing registered needs it" if not lib["kernels"] else "-"
    partly = {len(r["kernels"]) < len(lib["kernels"]) for r in lib["reasons"]} == {True}
    why = [r["text"] + (f" ({_grouped(r['kernels'])})" if partly else "") for r in lib["reasons"]]
    return lib["library"], versions or "no", usable, why or "-"


def _grouped(names: Sequence[str]) -> str:
    """``fa3.prefill, fa3.decode`` as ``fa3.prefill|decode``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        library, _, phase = name.rpartition(".")
        groups.setdefault(library, []).append(phase)
    return ", ".join(f"{library}.{'|'.join(phases)}" for library, phases in groups.items())


def _errata(errata: Sequence[Facts]) -> None:
    if not errata:
        line("none: no combination that is known to be bad is here")
        return
    rows = []
    for e in errata:
        when = " and ".join(f"{field} {allowed}" for field, allowed in e["when"].items()) or "always"
        rows.append((e["id"], e["severity"], ", ".join(e["kernels"]), when, e["summary"], e["url"]))
    table(("id", "severity", "kernels", "when", "what goes wrong", "report"), rows)


def _ledger(ledger: Facts) -> None:
    if not ledger:
        line("could not be read; see the problems below")
        return
    if ledger["simulated"]:
        line("a simulated device runs nothing, so nothing is verified on it")
        return
    if ledger["kernels"]:
        rows = [(k, str(n["verified"]), str(n["failed"])) for k, n in ledger["kernels"].items()]
        table(("kernel", "requests verified", "requests failed"), rows)
        for f in ledger["failures"]:
            line(f"{f['kernel']} failed on {f['date']}: {f['detail'].splitlines()[0]}")
    else:
        line("nothing yet: `hal verify` checks the kernels against the reference here")
    if ledger["elsewhere"]:
        line(f"{ledger['elsewhere']} further rows of {ledger['path']} are about other devices or versions")


def _decisions(decisions: Sequence[Facts]) -> None:
    if not decisions:
        line("nothing could be decided; see the problems below")
        return
    line(f"computing in {' or '.join(dict.fromkeys(d['dtype'] for d in decisions))}")
    table(("model", "KV cache", "pages", "prefill", "extend", "decode"), _decision_rows(decisions))
    if any(d["reference"] for d in decisions):
        line("(slow): the plain reference kernel, since nothing better fits; `hal explain attention` says why")


def _decision_rows(decisions: Sequence[Facts]) -> list[tuple[Any, ...]]:
    """A row for what is decided alike: first over the layers of a model, then over its cache formats."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for d in decisions:
        pages = f"{d['page_size']} {d['kv_layout']}" if d["cache"] else "-"
        kernels = tuple(_kernel(d, phase) for phase in ("prefill", "extend", "decode"))
        layers.setdefault((d["model"], d["cache"] or "none", pages, *kernels), []).append(d["layers"])
    kinds = {model: {d["layers"] for d in decisions if d["model"] == model} for model, *_ in layers}
    caches: dict[tuple[str, ...], list[str]] = {}
    for (model, cache, *rest), alike in layers.items():
        label = model if set(alike) == kinds[model] else f"{model}, {' and '.join(alike)} layers"
        caches.setdefault((label, *rest), []).append(cache)
    return [(label, names, *rest) for (label, *rest), names in caches.items()]


def _kernel(d: Facts, phase: str) -> str:
    if phase not in d["kernels"]:
        return "-"
    return (d["kernels"][phase] or "no kernel") + (" (slow)" if phase in d["reference"] else "")


def _advice(advice: Sequence[Facts]) -> None:
    if not advice:
        line("nothing: no library that is missing would be preferred for these models")
    for entry in advice:
        if "plugins" in entry:
            line(f"only the built-in plugins are here; an accelerator needs its vendor's: {entry['install']}")
        else:
            line(f"{entry['install']}: {_grouped(entry['kernels'])} would be first, for {', '.join(entry['models'])}")
