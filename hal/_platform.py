"""``Platform``: the contract of a hardware plugin."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from hal._arch import Arch
from hal._device import Device, Probe
from hal.errors import PluginError

if TYPE_CHECKING:
    from hal._errata import Erratum
    from hal._kernel import Kernel
    from hal._libraries import Library
    from hal_ops import Op

__all__ = ["PLUGIN_API", "Platform"]

PLUGIN_API = 1
"""Version of the plugin contract. A plugin states the one it was written for in ``Platform.api``."""

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


class Platform(ABC):
    """A vendor's plugin: finds its devices, says what they can do, and offers kernels.

    Subclass it, fill in the class attributes, and name the class in the entry-point group ``hal.platforms``. The
    contract is checked when the subclass is defined. Constructing a platform and calling :meth:`kernels`, :meth:`ops`,
    :meth:`libraries` and :meth:`errata` must touch no device and import no vendor library; :meth:`probe` must create
    no device context and must not raise because its hardware is absent.
    """

    name: ClassVar[str] = ""
    """How users address the platform, lower case; equal to the entry point's name."""
    vendor: ClassVar[str] = ""
    """The vendor's name, for people."""
    api: ClassVar[int] = PLUGIN_API
    torch_type: ClassVar[str] = "cpu"
    """Type of ``torch.device`` that addresses its devices."""
    runtime_name: ClassVar[str] = "runtime"
    """What the vendor calls its runtime (``cuda``, ``hip``): how texts show it, and a key of ``HAL_DEVICES``."""
    rank: ClassVar[int] = 50
    """Which platform is the default where several have devices: the highest. Accelerators 50, the CPU 0."""
    visibility: ClassVar[tuple[str, ...]] = ()
    """Environment variables that change which devices a process sees; probes are cached by their values."""

    @abstractmethod
    def probe(self, environ: Mapping[str, str]) -> Probe:
        """The devices that a process with this environment sees, and the evidence."""

    @abstractmethod
    def parse_arch(self, text: str) -> Arch:
        """The arch that any spelling of the vendor names.

        Raises:
            ValueError: ``text`` cannot be one of the vendor's archs. An arch that is new but well formed is no error.
        """

    @abstractmethod
    def capabilities(self, arch: Arch) -> frozenset[str]:
        """Names of what devices of this arch can do. Empty for an arch that is not known."""

    def simulate(self, device: Device) -> Device:
        """Complete a simulated device with what the vendor's product has (memory, multiprocessors, ...)."""
        return device

    def kernels(self) -> Iterable[Kernel]:
        """Declarations of the kernels on offer. Data only; a :class:`hal.ByOp` is loaded op by op."""
        return ()

    def ops(self) -> Iterable[Op]:
        """Contracts of ops that the plugin adds; a :class:`hal.ByOp` is loaded op by op."""
        return ()

    def libraries(self) -> Iterable[Library]:
        """The libraries whose presence and version matter to the kernels."""
        return ()

    def errata(self) -> Iterable[Erratum]:
        """Known-bad rows that the plugin ships."""
        return ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_contract(cls)


def _check_contract(cls: type[Platform]) -> None:
    if isinstance(cls.api, int) and cls.api != PLUGIN_API:
        return  # written for another contract: the loader refuses it, and says which side to upgrade
    problems = []
    if not _NAME.match(cls.name):
        problems.append(f"name={cls.name!r} must be lower-case letters, digits and '_', starting with a letter")
    if not isinstance(cls.api, int):
        problems.append(f"api={cls.api!r} must be the integer plugin API it was written for ({PLUGIN_API})")
    problems += _wrong_attributes(cls)
    problems += _unknown_members(cls) + _changed_signatures(cls)
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise PluginError(
            f"{cls.__module__}.{cls.__qualname__} breaks the Platform contract:\n{listed}", plugin=cls.name
        )


def _wrong_attributes(cls: type[Platform]) -> list[str]:
    problems = [
        f"{name}={value!r} must be a text"
        for name in ("vendor", "torch_type", "runtime_name")
        if not isinstance(value := getattr(cls, name), str)
    ]
    if not isinstance(cls.rank, int) or isinstance(cls.rank, bool):
        problems.append(f"rank={cls.rank!r} must be a whole number (accelerators 50, the CPU 0)")
    if isinstance(cls.visibility, str):
        problems.append("visibility must be a tuple of variable names, not a string")
    elif not isinstance(cls.visibility, tuple) or not all(isinstance(name, str) for name in cls.visibility):
        problems.append(f"visibility={cls.visibility!r} must be a tuple of variable names")
    return problems


def _unknown_members(cls: type[Platform]) -> list[str]:
    known = {n for n in vars(Platform) if not n.startswith("_")}
    own = [n for n in vars(cls) if not n.startswith("_")]
    return [
        f"{n!r} is no part of it: core would never call it; name helpers with a leading '_'"
        for n in own
        if n not in known
    ]


def _changed_signatures(cls: type[Platform]) -> list[str]:
    problems = []
    for name, method in vars(cls).items():
        base = vars(Platform).get(name)
        if name.startswith("_") or not inspect.isfunction(base):
            continue
        wanted, found = _parameters(base), []
        if inspect.isfunction(method):
            found = _parameters(method)
        if wanted != found:
            problems.append(f"{name}({', '.join(found)}) must take ({', '.join(wanted)})")
    return problems


def _parameters(method: Callable[..., Any]) -> list[str]:
    """Read off the code: ``inspect.signature`` takes half a millisecond for the methods of five platforms."""
    code = inspect.unwrap(method).__code__
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + starred])
