"""What ``hal doctor`` finds out, as JSON-ready facts. Nothing here imports torch or touches a device."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform as host
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hal import __version__, _devices, _plugins, _selection, _settings
from hal._device import Device
from hal._eligibility import Circumstances, why_not
from hal._forced import wrong_names
from hal._kernel import Band, Kernel
from hal._ledger import Ledger, Row, identity
from hal._libraries import installed, torch_build
from hal._registry import Registry
from hal.cli import _models
from hal.cli._devices import evidence
from hal.errors import HalError
from hal.testing import corners
from hal_ops import Request

__all__ = ["decisions", "installed_libraries", "report", "select_model", "versions"]


def report(device: Device, trouble: Sequence[str] = ()) -> dict[str, Any]:
    """Every section. What could not be found out, and what is wrong (``trouble`` too), is listed under ``problems``."""
    registry, settings = _plugins.registry(), _settings.current()
    ledger = Ledger(settings.cache_dir() / "ledger.json")
    around = Circumstances(device, registry, settings, ledger)
    problems = [*trouble, *_machine_problems(), *wrong_names(settings, registry)]
    libraries = _or_problem(lambda: _libraries(around), [], problems)
    decided = [] if device.unusable else decisions(device, problems)
    return {
        "versions": versions(),
        "plugins": [dataclasses.asdict(p) for p in _plugins.plugins()],
        "devices": [d.as_dict() for d in _devices.devices()],
        "evidence": evidence(_devices.probe_report()),
        "default_device": device.id,
        "libraries": libraries,
        "errata": _errata(registry, device),
        "ledger": _or_problem(lambda: _ledger(ledger, registry, device), {}, problems),
        "decisions": decided,
        "advice": [*_advice(decided), *_missing_plugins(registry)],
        "problems": problems,
    }


def _or_problem(ask: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    """One section; if it cannot be had, that is a problem to show and the others are still answered."""
    try:
        return ask()
    except HalError as error:
        problems += [str(error)] if str(error) not in problems else []
        return otherwise


def versions() -> dict[str, Any]:
    """Versions of what every decision and time depends on: HAL, Python, the system, torch and its build, Triton."""
    build = dict(torch_build())
    return {
        "torch-hal": __version__,
        "python": host.python_version(),
        "system": f"{host.system()} {host.machine()}",
        "torch": str(installed("torch") or "not installed"),
        "torch_build": {name: version for name, version in build.items() if name != "torch"},
        "triton": str(installed("triton") or "not installed"),
    }


def installed_libraries() -> dict[str, str]:
    """Version of each distribution that is installed and that some kernel may come from."""
    names = {name for library in _plugins.registry().libraries.values() for name in library.names()}
    return {name: str(version) for name in sorted(names) if (version := installed(name)) is not None}


def _machine_problems() -> list[str]:
    failed = [p for p in _plugins.plugins() if p.status == "failed"]
    problems = [f"plugin {p.name} of {p.distribution} {p.version} could not be used: {p.error}" for p in failed]
    return problems + [f"{d} cannot be used: {d.unusable}" for d in _devices.devices() if d.unusable]


def _libraries(around: Circumstances) -> list[dict[str, Any]]:
    """Every library that some kernel needs, and for this device which of those kernels it could serve, or why not."""
    wanted: dict[str, tuple[str, ...]] = {lib.name: lib.names() for lib in around.registry.libraries.values()}
    kernels: dict[str, list[Kernel]] = {}
    for kernel in around.registry.kernels.values():
        for needs in kernel.needs:
            wanted.setdefault(needs.library, needs.names())
        for library in _told_of({needs.library for needs in kernel.needs}):
            kernels.setdefault(library, []).append(kernel)
    return [_library(name, wanted[name], kernels.get(name, []), around) for name in sorted(wanted)]


def _told_of(libraries: set[str]) -> set[str]:
    """Where a kernel is told of, by the libraries that it needs: what all others are built on has its own kernels."""
    for base in ("torch", "triton"):
        libraries = libraries - {base} or libraries
    return libraries


def _library(name: str, names: Sequence[str], kernels: Sequence[Kernel], around: Circumstances) -> dict[str, Any]:
    found = {n: str(version) for n in names if (version := installed(n)) is not None}
    reasons: dict[str, list[str]] = {}
    usable = []
    for kernel in kernels:
        why = _machine_reasons(kernel, around)
        if not why:
            usable.append(kernel.name)
        for reason in why:
            reasons.setdefault(reason, []).append(kernel.name)
    return {
        "library": name,
        "installed": found,
        "kernels": [k.name for k in kernels],
        "usable": usable,
        "reasons": [{"text": text, "kernels": names} for text, names in reasons.items()],
    }


def _machine_reasons(kernel: Kernel, around: Circumstances) -> list[str]:
    """Why this machine cannot run a kernel, whatever the request: what its plainest request meets already."""
    plain = _plain(kernel, around.registry)
    reasons = [r for r in why_not(kernel, plain, around) if r.field not in plain.rules()]
    elsewhere = [r for r in reasons if r.code == "wrong_vendor"]
    return [str(r) for r in elsewhere or reasons]


def _plain(kernel: Kernel, registry: Registry) -> Request:
    return corners(kernel, op=registry.op(kernel.op), limit=1)[0]


def _errata(registry: Registry, device: Device) -> list[dict[str, Any]]:
    """The known-bad rows about kernels for this device that hold for it and for what is installed."""
    kernels = [k for k in registry.kernels.values() if not k.platforms or device.platform in k.platforms]
    plain = [(k, _plain(k, registry)) for k in kernels]
    rows = []
    for e in registry.errata:
        anywhere = dataclasses.replace(e, when={})
        if any(anywhere.matches(kernel, request, device) for kernel, request in plain):
            facts = {name: getattr(e, name) for name in ("id", "kernels", "severity", "summary", "url")}
            rows.append(facts | {"when": {field: c.allowed() for field, c in e.when.items()}})
    return rows


def _ledger(ledger: Ledger, registry: Registry, device: Device) -> dict[str, Any]:
    """How many requests each kernel passed and failed on this device with these versions, and rows of other ones."""
    here: dict[str, dict[str, int]] = {}
    failures = []
    rows = ledger.rows()
    for row in rows:
        kernel = registry.kernels.get(row.kernel)
        if kernel is not None and not device.simulated and row.key == identity(kernel, device):
            counts = here.setdefault(row.kernel, {"verified": 0, "failed": 0})
            counts[row.status] += 1
            failures += [_failure(row)] if row.status == "failed" else []
    counted = sum(sum(c.values()) for c in here.values())
    facts = {"path": str(ledger.path), "simulated": device.simulated, "kernels": here, "failures": failures}
    return {**facts, "elsewhere": len(rows) - counted}


def _failure(row: Row) -> dict[str, Any]:
    return {"kernel": row.kernel, "corner": row.corner, "detail": row.detail, "date": row.date}


def decisions(device: Device, problems: list[str]) -> list[dict[str, Any]]:
    """The kernels that each well-known model would get, a row for each cache format and kind of layer."""
    rows = []
    for model in _models.MODELS:
        for cache, requests in _models.requests_for(model, device).items():
            chosen = _or_problem(functools.partial(select_model, requests, device), (), problems)
            rows += [_decision(model, cache, kind, s) for kind, s in zip(requests, chosen, strict=False)]
    problems += [
        f"{r['model']} {r['cache']}: no kernel for {phase}"
        for r in rows
        for phase, kernel in r["kernels"].items()
        if kernel is None
    ]
    return rows


def select_model(requests: dict[str, Any], device: Device) -> tuple[Any, ...]:
    """A model's layers share one cache, so they are decided together."""
    return _selection.select_together(list(requests.values()), device=device)


def _decision(model: _models.Model, cache: str, kind: str, selection: Any) -> dict[str, Any]:
    request = selection.request
    return {
        "model": model.name,
        "layers": kind,
        "dtype": request.dtype,
        "cache": request.kv_dtype if cache else "",
        "page_size": request.page_size if cache else None,
        "kv_layout": getattr(request, "kv_layout", "latent") if cache else None,
        "kernels": selection.kernels(),
        "reference": [p for p, c in selection.choices.items() if c.kernel and c.kernel.band == Band.REFERENCE],
        "request": request.as_dict(),
        "near_misses": [n.as_dict() for n in selection.near_misses()],
    }


def _advice(decided: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to install to get better kernels: near misses that need nothing but an installation, most useful first."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in decided:
        for near in row["near_misses"]:
            if near["install"] and not near["changes"] and near["first"]:
                entry = found.setdefault(" and ".join(near["install"]), {"kernels": [], "models": []})
                entry["kernels"] += [k for k in near["kernels"] if k not in entry["kernels"]]
                entry["models"] += [row["model"]] if row["model"] not in entry["models"] else []
    ranked = sorted(found.items(), key=lambda item: -len(item[1]["models"]))
    return [{"install": install, **entry} for install, entry in ranked]


def _missing_plugins(registry: Registry) -> list[dict[str, Any]]:
    """Which extras would bring vendors' plugins, where none is installed at all."""
    if {s.distribution for key, s in registry.sources.items() if key.startswith("platform:")} != {"torch-hal"}:
        return []
    try:
        extras = importlib.metadata.metadata("torch-hal").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    vendors = [e for e in extras if e != "torch"]
    command = " or ".join(f"`pip install 'torch-hal[{vendor}]'`" for vendor in vendors)
    return [{"install": command, "kernels": [], "models": [], "plugins": vendors}] if vendors else []
