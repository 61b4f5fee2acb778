"""``make_platform``: platforms of made-up hardware, for tests of plugins, kernels and selection."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hal._arch import Arch
from hal._device import Device, Evidence, Probe
from hal._errata import Erratum
from hal._kernel import Kernel
from hal._libraries import Library
from hal._platform import Platform
from hal._version import Version
from hal_ops import Op

__all__ = ["make_platform"]

_ARCH = re.compile(r"([a-z]+)_?(\d+)\Z")


def make_platform(
    name: str = "fake",
    *,
    archs: Sequence[str] | Mapping[str, Iterable[str]] = ("fake_1",),
    kernels: Iterable[Kernel] = (),
    torch_type: str = "cpu",
    devices: Iterable[str | Device] | None = None,
    ops: Iterable[Op] = (),
    libraries: Iterable[Library] = (),
    errata: Iterable[Erratum] = (),
    rank: int = 50,
    runtime_name: str = "runtime",
    visibility: tuple[str, ...] = (),
) -> type[Platform]:
    """A platform class of hardware that does not exist, to plug in with the fixture ``fake_plugin``.

    Args:
        name: of the platform, and of the plugin. archs: names, oldest first, or name to capabilities. A name is letters
            and a number (``fake_1``): letters are the line, numbers order it.
        kernels, ops, libraries, errata: what it offers.
        torch_type: where its devices' tensors live. With ``"cpu"`` kernels run anywhere.
        devices: what the probe finds: archs, or whole ``Device`` objects; default: one device of each arch.
        rank, runtime_name, visibility: see ``hal.Platform``.

    Raises:
        PluginError: the class breaks the ``Platform`` contract.
        ValueError: an arch that is not letters and a number.
    """
    abilities = dict(archs) if isinstance(archs, Mapping) else dict.fromkeys(archs, ("bf16", "fp16"))
    parts = _Parts(name, torch_type, {a: frozenset(c) for a, c in abilities.items()})
    found = parts.devices(abilities if devices is None else devices)
    offers = {"kernels": kernels, "ops": ops, "libraries": libraries, "errata": errata}
    body: dict[str, Any] = {
        "name": name,
        "vendor": f"{name.title()} Inc.",
        "torch_type": torch_type,
        "rank": rank,
        "runtime_name": runtime_name,
        "visibility": visibility,
        "probe": lambda self, environ: Probe(found, (Evidence(f"{name} bus", f"{len(found)} devices", len(found)),)),
        "parse_arch": lambda self, text: parts.arch(text),
        "capabilities": lambda self, arch: parts.abilities.get(arch.name, frozenset()),
        "__doc__": f"Made-up hardware of platform {name!r}.",
        **{method: _returning(tuple(values)) for method, values in offers.items()},
    }
    made: type[Platform] = types.new_class(
        f"{name.title()}Platform", (Platform,), {}, lambda members: members.update(body)
    )
    return made


def _returning(values: tuple[Any, ...]) -> Any:
    return lambda self: values


class _Parts:
    """What the methods of a made-up platform share."""

    def __init__(self, platform: str, torch_type: str, abilities: dict[str, frozenset[str]]) -> None:
        self.platform = platform
        self.torch_type = torch_type
        self.abilities = abilities

    def arch(self, text: str) -> Arch:
        match = _ARCH.match(text.strip().lower())
        if match is None:
            raise ValueError(
                f"{text!r} is no arch of platform {self.platform!r}: write letters and a number, such as 'fake_1'"
            )
        return Arch(self.platform, text.strip().lower(), match[1], (int(match[2]),))

    def devices(self, wanted: Iterable[str | Device]) -> tuple[Device, ...]:
        return tuple(d if isinstance(d, Device) else self.device(d, index) for index, d in enumerate(wanted))

    def device(self, name: str, index: int) -> Device:
        return Device(
            platform=self.platform,
            arch=self.arch(name),
            index=index,
            name=f"{self.platform} {name}",
            runtime=Version.parse("1.0"),
            driver=Version.parse("1.0"),
            capabilities=self.abilities.get(name, frozenset()),
            torch_type=self.torch_type,
        )
