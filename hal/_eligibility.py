"""Eligibility: every reason why a kernel cannot serve a request on a device.

One function, :func:`why_not`, answers for selection, errors, ``hal explain``, tables and tests. An empty list is a yes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hal._device import Device
from hal._failures import Failures
from hal._kernel import Band, Kernel, Needs
from hal._ledger import Ledger, Row
from hal._libraries import has_module, installed
from hal._reason import Reason
from hal._registry import Registry
from hal._settings import Settings
from hal._version import Version
from hal_ops import AUTO, Request, record

if TYPE_CHECKING:
    from hal._errata import Erratum

__all__ = ["Circumstances", "eligible", "elsewhere", "why_not"]


@record(frozen=True)
class Circumstances:
    """What a decision depends on beside the request and the kernel."""

    device: Device
    registry: Registry
    settings: Settings
    ledger: Ledger
    failures: Failures = dataclasses.field(default_factory=Failures)
    """Kernels that could not be imported or made in this process."""

    def ledger_row(self, kernel: Kernel, request: Request) -> Row | None:
        """The ledger's row for this kernel here; nothing is verified on a simulated device."""
        return None if self.device.simulated else self.ledger.find(kernel, request, self.device)


def why_not(kernel: Kernel, request: Request, around: Circumstances) -> list[Reason]:
    """All reasons, hardware and installation before the request's fields. Fields left open are not judged."""
    return list(_reasons(kernel, request, around))


def eligible(kernel: Kernel, request: Request, around: Circumstances) -> bool:
    """Whether there is no reason; the first one ends the search."""
    return not elsewhere(kernel, around) and next(_reasons(kernel, request, around), None) is None


def elsewhere(kernel: Kernel, around: Circumstances) -> bool:
    """Whether the kernel is for other vendors' devices only, so that nothing about the request could admit it."""
    return bool(kernel.platforms) and around.device.platform not in kernel.platforms


def _reasons(kernel: Kernel, request: Request, around: Circumstances) -> Iterator[Reason]:
    yield from _known_bad(kernel, request, around)
    yield from _on_record(kernel, request, around)
    yield from _settings_say(kernel, around)
    yield from _hardware(kernel, around)
    yield from _libraries(kernel, around)
    yield from _fields(kernel, request)
    yield from _own_check(kernel, request, around)


def _known_bad(kernel: Kernel, request: Request, around: Circumstances) -> Iterator[Reason]:
    for erratum in errata_for(kernel, request, around):
        if erratum.severity != "slow":
            yield erratum.reason()


def errata_for(kernel: Kernel, request: Request, around: Circumstances) -> tuple[Erratum, ...]:
    """The errata that speak about this kernel here."""
    return tuple(e for e in around.registry.errata if e.matches(kernel, request, around.device))


def _on_record(kernel: Kernel, request: Request, around: Circumstances) -> Iterator[Reason]:
    failure = around.failures.find(kernel, request, around.device)
    if failure is not None:
        yield failure
    row = around.ledger_row(kernel, request)
    if row is not None and row.status == "failed":
        text = f"it failed verification on this device on {row.date}: {row.detail}"
        yield Reason("quarantined", text, remedy=f"`hal verify --kernel {kernel.name}` tries again")
    elif around.settings["verify"] == "require" and row is None and kernel.band != Band.REFERENCE:
        text = f"{around.settings.value('verify').source} requires verified kernels, and this one is only claimed here"
        yield Reason("unverified", text, field="setting", remedy=f"`hal verify --kernel {kernel.name}`")


def _settings_say(kernel: Kernel, around: Circumstances) -> Iterator[Reason]:
    disabled = around.settings.value("disable")
    for name in disabled.value:
        if kernel.answers_to(name):
            yield Reason(
                "disabled_by_env", f"{disabled.source} disables {name}", field="setting", remedy="take it out there"
            )
    if kernel.band == Band.REFERENCE and around.settings["strict"]:
        source = around.settings.value("strict").source
        yield Reason("not_strict", f"{source} forbids the slow reference kernels", field="setting")


def _hardware(kernel: Kernel, around: Circumstances) -> Iterator[Reason]:
    device = around.device
    if device.unusable:
        yield Reason("runtime_missing", device.unusable, field="device")
    if elsewhere(kernel, around):
        platforms = " or ".join(kernel.platforms)
        yield Reason(
            "wrong_vendor", f"for {platforms} only; this is {device.platform}", "device", device.platform, platforms
        )
        return
    yield from _arch(kernel, around)
    yield from _version(device, "runtime", _runtime_name(around), kernel.runtime, device.runtime)
    yield from _version(device, "driver", "driver", kernel.driver, device.driver)
    yield from _capabilities(kernel, device)


def _capabilities(kernel: Kernel, device: Device) -> Iterator[Reason]:
    lacking, arch = sorted(kernel.capabilities - device.capabilities), device.arch.name
    if lacking and not device.capabilities:
        text = f"what {arch} can do is not known; this needs {' and '.join(lacking)}"
        yield Reason("capability_missing", text, "device", arch, " and ".join(lacking))
        return
    for name in lacking:
        yield Reason("capability_missing", f"{arch} has no {name}", "device", arch, name)


def _runtime_name(around: Circumstances) -> str:
    platform = around.registry.platforms.get(around.device.platform)
    return "runtime" if platform is None else platform.runtime_name


def _arch(kernel: Kernel, around: Circumstances) -> Iterator[Reason]:
    arch = around.device.arch
    archs = kernel.platforms.get(around.device.platform)
    if archs is not None:
        code = archs.refusal(arch, around.registry.platforms[around.device.platform].parse_arch)
        if code:
            yield Reason(code, f"needs {archs.words()}; this is {arch.name}", "device", arch.name, archs.words())
    yield from _build(kernel, arch.name)


def _build(kernel: Kernel, arch: str) -> Iterator[Reason]:
    """What the installed binary was built for. A plugin that cannot tell refuses its kernel, and hides no other."""
    try:
        built = kernel.built_archs() if kernel.built_archs else None
        listed = "" if built is None else ", ".join(sorted(built))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - becomes the kernel's reason
        text = f"built_archs() of {kernel.name} failed: {type(error).__name__}: {error}"
        yield Reason("plugin_failed", text, "library")
        return
    if built is not None and arch not in built:
        text = f"the installed build is for {listed}, not for {arch}"
        yield Reason("build_lacks_arch", text, "device", arch, listed)


def _version(device: Device, field: str, name: str, wanted: str, found: Version) -> Iterator[Reason]:
    if not wanted:
        return
    verdict = found.satisfies(wanted)
    if verdict is None:
        yield Reason(
            "version_unknown",
            f"needs {name} {wanted}; the version here is unknown ({found.reason})",
            field,
            "unknown",
            wanted,
            _description(device, name, wanted) if device.simulated else "",
        )
    elif not verdict:
        yield Reason(f"{field}_too_old", f"needs {name} {wanted}; this is {found}", field, str(found), wanted)


def _description(device: Device, name: str, wanted: str) -> str:
    """How a simulated device is given a version that would do."""
    lowest = re.search(r"\d[\w.]*", wanted)
    return f"write {device.platform}:{device.arch.name},{name}={lowest[0] if lowest else wanted}"


def _libraries(kernel: Kernel, around: Circumstances) -> Iterator[Reason]:
    for needs in kernel.needs:
        found = next((v for v in map(installed, needs.names()) if v is not None), None)
        if found is None:
            yield Reason(
                "not_installed", f"{needs.library} is not installed", "library", "", needs.versions, _install(needs)
            )
        elif needs.module and not has_module(needs.module):
            text = f"{needs.library} {found} here is another project of that name: it has no {needs.module}"
            yield Reason("not_installed", text, "library", str(found), needs.versions, _install(needs))
        elif needs.versions:
            yield from _library_version(needs, found)


def _library_version(needs: Needs, found: Version) -> Iterator[Reason]:
    verdict = found.satisfies(needs.versions)
    if verdict:
        return
    if verdict is None:
        code, text = "version_unknown", f"the version of {needs.library} is unknown ({found.reason})"
    else:
        code = "version_too_old" if _below(found, needs.versions) else "version_too_new"
        text = f"needs {needs.library} {needs.versions}; {found} is installed"
    because = f" ({needs.because})" if needs.because else ""
    remedy = _exactly(needs) if code == "version_too_new" else _install(needs)
    yield Reason(code, text + because, "library", str(found), needs.versions, remedy)


def _below(found: Version, wanted: str) -> bool:
    """Whether a version fails because of a lower bound."""
    lower = ",".join(part for part in wanted.split(",") if part.strip().startswith((">", "~=", "==")))
    bounds = [Version.parse(part.strip().lstrip(">=~ ")) for part in lower.split(",") if part]
    return any(found < bound for bound in bounds) or (bool(lower) and found.satisfies(lower) is False)


def _install(needs: Needs) -> str:
    return needs.install or _exactly(needs)


def _exactly(needs: Needs) -> str:
    """In the versions that are needed: what a kernel says of installing may bring the newest."""
    return f"`pip install '{needs.library}{needs.versions}'`"


def _fields(kernel: Kernel, request: Request) -> Iterator[Reason]:
    rules = request.rules()
    for name, rule in rules.items():
        value = getattr(request, name)
        if not rule.applies(kernel.phase) or value == AUTO:
            continue
        if name in kernel.fields:
            if not kernel.fields[name].admits(value, request):
                yield _not_allowed(kernel, name, value, rule.code)
        elif not request.is_neutral(name):
            text = f"{name} {_shown(value)}: {kernel.name} does not declare it".replace(" True", "")
            yield Reason(rule.code, text, name, _shown(value))
    for name in request.derived:
        if name in kernel.fields and not kernel.fields[name].admits(getattr(request, name), request):
            yield _not_allowed(kernel, name, getattr(request, name), "feature_unsupported")


def _own_check(kernel: Kernel, request: Request, around: Circumstances) -> Iterator[Reason]:
    """What the kernel's own ``check`` says. One that is broken refuses its kernel, and hides no other.

    It is asked about devices of the kernel's own platforms: what it knows of archs and runtimes holds for no others.
    """
    if kernel.check is None or (kernel.platforms and around.device.platform not in kernel.platforms):
        return
    try:
        for reason in kernel.check(request, around.device):
            if not isinstance(reason, Reason):
                raise TypeError(f"it gave {reason!r}, and not a hal.Reason")
            yield reason
    except (Exception, SystemExit) as error:  # noqa: BLE001 - becomes the kernel's reason
        yield Reason("plugin_failed", f"check() of {kernel.name} failed: {type(error).__name__}: {error}", "library")


def _not_allowed(kernel: Kernel, name: str, value: Any, code: str) -> Reason:
    allowed = kernel.fields[name].allowed()
    return Reason(code, f"{name} {_shown(value)}; needs {allowed}", name, _shown(value), allowed)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
