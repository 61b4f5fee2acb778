"""The machine that a command answers for: this one, or a simulated one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from hal.errors import DeviceError, SimulationError

__all__ = ["machine", "machine_options"]

F = TypeVar("F", bound=Callable[..., Any])

_REAL = re.compile(r"\w+(:\d+)?\Z")
_KEPT = ("torch", "triton")

_DEVICE_HELP = (
    "A device of this machine, such as nvidia:0, or one to simulate: platform:arch with further facts, such as "
    "nvidia:sm_100,cuda=12.8,driver=570. Default: the default device."
)
_LIBRARY_HELP = (
    "Suppose that this is installed, written name==version; may be given more than once. What is given replaces "
    "everything that is really installed, except torch and triton."
)


def machine_options(command: F) -> F:
    """Add ``--device`` and ``--library``."""
    device = click.option("--device", metavar="DEVICE", help=_DEVICE_HELP)
    library = click.option("--library", "libraries", metavar="NAME==VERSION", multiple=True, help=_LIBRARY_HELP)
    return device(library(command))


@contextmanager
def machine(device: str | None, libraries: Sequence[str] = ()) -> Iterator[Any]:
    """Answer for this device and these libraries inside the block; gives the ``hal.Device``.

    Raises:
        click.BadParameter: the description of a device or a library does not parse.
        DeviceError: this machine has no such device.
    """
    from hal import _devices, _simulate

    text = device if device and not _REAL.match(device.strip()) else None
    with _simulate.simulate(text, libraries=_supposed(libraries)):
        if text is None:
            yield _real(device)
            return
        try:
            found = _devices.devices()
        except SimulationError as error:
            raise click.BadParameter(str(error), param_hint="'--device'") from error
        yield _one(found, text)


def _one(found: Sequence[Any], text: str) -> Any:
    """The device that a description is of; several that are alike are answered for by the first."""
    if not found:
        raise click.BadParameter(
            f"{text!r} describes no device: write platform:arch, such as cpu:x86_64", param_hint="'--device'"
        )
    alike = {dataclasses.replace(device, index=0) for device in found}
    if len(alike) > 1:
        raise click.BadParameter(
            f"{text!r} describes {len(found)} devices, and the answer is for one: ask about each in turn",
            param_hint="'--device'",
        )
    return found[0]


def _real(device: str | None) -> Any:
    from hal import _devices

    try:
        return _devices.device(device)
    except DeviceError as error:
        hint = _simulation_hint(device)
        raise DeviceError(f"{error}{hint}", evidence=error.evidence) from error


def _simulation_hint(text: str | None) -> str:
    """What to write to simulate, for a text that is an arch of some platform."""
    from hal import _plugins

    arch = (text or "").partition(":")[2] or text or ""
    meant = [f"--device {name}:{arch}" for name, p in _plugins.registry().platforms.items() if _is_arch(p, arch)]
    return f"\nTo simulate one that is not here: {' or '.join(meant)}" if meant else ""


def _is_arch(platform: Any, text: str) -> bool:
    try:
        arch = platform.parse_arch(text)
    except ValueError:
        return False
    return bool(arch.line)


def _supposed(libraries: Sequence[str]) -> dict[str, str] | None:
    """The libraries to simulate, or None for those that are installed."""
    from hal import _plugins
    from hal._libraries import installed, normalize
    from hal._simulate import known_libraries, unknown_library

    if not libraries:
        return None
    known = known_libraries(_plugins.registry())
    given: dict[str, str] = {}
    for text in libraries:
        name, equals, version = (part.strip() for part in text.partition("=="))
        if not (name and equals and version):
            raise click.BadParameter(f"{text!r}: write name==version", param_hint="'--library'")
        if normalize(name) not in known:
            raise click.BadParameter(unknown_library(name, known), param_hint="'--library'")
        distribution = known[normalize(name)]
        if distribution in given:
            text = f"{text!r}: {distribution} is given a second time, after =={given[distribution]}"
            raise click.BadParameter(text, param_hint="'--library'")
        given[distribution] = version
    kept = {name: str(installed(name)) for name in _KEPT if installed(name) is not None}
    return {**kept, **given}
