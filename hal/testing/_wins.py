"""Every kernel must win somewhere: one that no device and no request ever selects is dead, or declared wrongly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from hal._device import Device
from hal._devices import devices
from hal._kernel import Archs, Band, Kernel, Needs
from hal._libraries import installed, simulated_libraries
from hal._platform import Platform
from hal._registry import Registry
from hal._version import Version
from hal.testing._corners import corners
from hal.testing._matrix import selected
from hal.testing._plugin_checks import Finding, Plugin, arch_names

__all__ = ["home_on", "simulated_homes", "wins"]


def wins(plugin: Plugin, homes: Sequence[str | Device] = ()) -> Finding:
    """Each kernel is chosen for at least one of its corners on one of the devices, with the libraries it needs.

    ``homes`` are devices; the default is one of each arch that the kernel names, with the newest runtime and driver
    that the platform's declarations speak of. Reference kernels may stay unchosen: they are for what nothing else does.
    """
    found = Finding()
    platform = plugin.platform()
    for kernel in platform.kernels():
        if kernel.band == Band.REFERENCE:
            continue
        tried = tuple(homes) or tuple(simulated_homes(kernel, plugin.registry()))
        if not tried:
            found.problems.append(f"{kernel.name}: no arch that it names can be simulated; pass devices=")
        elif not any(_wins_on(kernel, home, plugin.registry()) for home in tried):
            where, why = ", ".join(map(str, tried)), _why(kernel, tried[0], plugin)
            found.problems.append(f"{kernel.name} is chosen for none of its corners (on {where}): {why}")
    return found


def _wins_on(kernel: Kernel, home: str | Device, registry: Registry) -> bool:
    with simulated_libraries(_libraries(kernel)):
        for request in corners(kernel, op=registry.op(kernel.op)):
            selection = selected(home, request)
            if kernel.name in selection.kernels().values():
                return True
    return False


def _why(kernel: Kernel, home: str | Device, plugin: Plugin) -> str:
    """What stands in the way of the kernel's plainest corner."""
    registry = plugin.registry()
    with simulated_libraries(_libraries(kernel)):
        selection = selected(home, corners(kernel, op=registry.op(kernel.op), limit=1)[0])
    choice = selection.choices[kernel.phase]
    mine = next((c for c in choice.candidates if c.kernel.name == kernel.name), None)
    if mine is None:
        return "it is not registered: plug the platform in first"
    if mine.reasons:
        return "; ".join(str(r) for r in mine.reasons)
    best = next((c for c in choice.candidates if c.status == "chosen"), None)
    first = "nothing" if best is None else f"{best.kernel.name} (priority {best.priority})"
    return f"{first} comes before it (priority {mine.priority})"


def simulated_homes(kernel: Kernel, registry: Registry) -> Iterator[Device]:
    """Devices that a kernel is declared for, made from its own words.

    For a kernel of every platform that is the CPU, and where it asks for capabilities, all platforms' devices.
    """
    everywhere = registry.platforms if kernel.capabilities else ("cpu",)
    names = kernel.platforms or dict.fromkeys(everywhere, Archs())
    for name, mine in names.items():
        platform = registry.platforms.get(name)
        if platform is not None:
            patterns = mine.only or ((mine.at_least,) if mine.at_least else ())
            for arch in _archs(platform, patterns):
                yield home_on(platform, arch, kernel)


def _archs(platform: Platform, patterns: Iterable[str]) -> tuple[str, ...]:
    """Arch names that meet the patterns: those that the platform names anywhere, or else a pattern filled in."""
    known = arch_names(platform)
    wanted = tuple(patterns)
    if not wanted:
        return known[:8] or tuple({d.arch.name: None for d in devices(platform.name)})
    found: dict[str, None] = {}
    for pattern in wanted:
        matching = [a for a in known if fnmatchcase(a, pattern)]
        filled = [re.sub(r"[*?]|\[[^]]*\]", digits, pattern) for digits in ("0", "00", "1", "")]
        found.update(dict.fromkeys(matching or [a for a in filled if _parses(platform, a)][:1]))
    return tuple(found)


def _parses(platform: Platform, arch: str) -> bool:
    try:
        return bool(platform.parse_arch(arch))
    except ValueError:
        return False


def home_on(platform: Platform, name: str, kernel: Kernel) -> Device:
    """A device of the platform's arch of that name, on which the kernel's versions are met.

    Raises:
        ValueError: the platform knows no such arch.
    """
    arch = platform.parse_arch(name)
    kernels = tuple(platform.kernels())
    return platform.simulate(
        Device(
            platform=platform.name,
            arch=arch,
            torch_type=platform.torch_type,
            capabilities=platform.capabilities(arch),
            runtime=fitting(kernel.runtime, [k.runtime for k in kernels]),
            driver=fitting(kernel.driver, [k.driver for k in kernels]),
            simulated=True,
        )
    )


def fitting(specifier: str, others: Iterable[str] = ()) -> Version:
    """The newest version that meets a specifier, of those that it or any of the others speaks of."""
    texts = {v for spec in (specifier, *others) for v in re.findall(r"\d+(?:\.\d+)*", spec)}
    spoken = {Version.parse(t) for t in texts} | {Version.parse(f"{t}.1") for t in texts} | {Version.parse("1.0")}
    meeting = [v for v in spoken if not specifier or v.satisfies(specifier)]
    return max(meeting) if meeting else Version.unknown(f"no version was found that meets {specifier}")


def _libraries(kernel: Kernel) -> dict[str, str]:
    """Torch and Triton as they are here, and what the kernel needs, at the newest version that it speaks of."""
    here = {name: str(version) for name in ("torch", "triton") if (version := installed(name))}
    return {**here, **{n.names()[0]: _version(n) for n in kernel.needs}}


def _version(needs: Needs) -> str:
    found = next((v for v in map(installed, needs.names()) if v), None)
    suits = found is not None and (not needs.versions or found.satisfies(needs.versions))
    return str(found if suits else fitting(needs.versions))
