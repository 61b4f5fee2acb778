"""The exceptions that HAL raises. Each carries, as attributes, the facts that its text states.

::

    HalError
    ├── SettingError          an unknown HAL_* variable, config key or value        (also ValueError)
    ├── SimulationError       a device description that does not parse              (also ValueError)
    ├── PluginError           a plugin that breaks the contract, or could not load
    ├── DeviceError           no such device, or one that cannot be used            (also LookupError)
    ├── VisibilityError       visibility variables that contradict each other       (also ValueError)
    ├── RegistrationError     an op or kernel declared wrongly                      (also ValueError)
    ├── UnknownOpError        no op of that name                                    (also LookupError)
    ├── UnknownKernelError    no kernel or library of that name                     (also LookupError)
    ├── NoKernelError         no kernel can serve the request; holds the selection
    ├── LockError             a decision differs from the lock file
    ├── RankMismatchError     ranks of one job decided differently
    ├── InputError            arguments of a call that do not fit the request       (also ValueError)
    │   └── PlanMismatchError a plan given to a handle that did not make it
    └── WorkspaceError        a frozen work buffer was asked to grow
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "DeviceError",
    "HalError",
    "InputError",
    "LockError",
    "NoKernelError",
    "PlanMismatchError",
    "PluginError",
    "RankMismatchError",
    "RegistrationError",
    "SettingError",
    "SimulationError",
    "UnknownKernelError",
    "UnknownOpError",
    "VisibilityError",
    "WorkspaceError",
    "did_you_mean",
]


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """``" Did you mean 'x'?"`` for the nearest of ``known``, or an empty string. A ``prefix`` of all does not count."""
    spelled = {k.removeprefix(prefix).lower(): k for k in known}
    near = difflib.get_close_matches(name.removeprefix(prefix).lower(), spelled, n=1, cutoff=0.55)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


class HalError(Exception):
    """Base of every error that HAL raises."""


class SettingError(HalError, ValueError):
    """A ``HAL_*`` variable, config key or value that HAL does not know. ``setting`` names it."""

    def __init__(self, text: str, *, setting: str = "") -> None:
        super().__init__(text)
        self.setting = setting


class SimulationError(HalError, ValueError):
    """A device description that does not parse. ``position`` is the offset of the offending character."""

    def __init__(self, text: str, *, source: str = "", position: int = 0) -> None:
        pointer = f"\n  {source}\n  {' ' * position}^" if source else ""
        super().__init__(text + pointer)
        self.source = source
        self.position = position


class PluginError(HalError):
    """A plugin that breaks the contract or could not be loaded. ``plugin`` and ``distribution`` name it."""

    def __init__(self, text: str, *, plugin: str = "", distribution: str = "") -> None:
        super().__init__(text)
        self.plugin = plugin
        self.distribution = distribution


class DeviceError(HalError, LookupError):
    """No device like the one asked for, or one that cannot be used. ``evidence`` lists what each probe saw."""

    def __init__(self, text: str, *, evidence: Any = ()) -> None:
        super().__init__(text)
        self.evidence = evidence


class VisibilityError(HalError, ValueError):
    """Variables that select visible devices contradict each other. ``variables`` maps names to values."""

    def __init__(self, text: str, *, variables: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.variables: dict[str, str] = variables or {}


class RegistrationError(HalError, ValueError):
    """An op, kernel or erratum whose declaration is wrong. ``name`` is the declared name."""

    def __init__(self, text: str, *, name: str = "") -> None:
        super().__init__(text)
        self.name = name


class UnknownOpError(HalError, LookupError):
    """No registered op has this name. ``name`` is the one asked for, ``known`` those there are."""

    def __init__(self, text: str, *, name: str = "", known: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.name = name
        self.known = known


class UnknownKernelError(HalError, LookupError):
    """No registered kernel or library has this name. ``name`` is the one asked for, ``known`` those there are."""

    def __init__(self, text: str, *, name: str = "", known: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.name = name
        self.known = known


class NoKernelError(HalError):
    """No kernel can serve the request. ``selection`` holds the request, the device and every candidate's reasons."""

    def __init__(self, text: str, *, selection: Any = None) -> None:
        super().__init__(text)
        self.selection = selection

    def as_dict(self) -> dict[str, Any]:
        """The same facts as data."""
        return {} if self.selection is None else dict(self.selection.as_dict())


class LockError(HalError):
    """A decision differs from the lock file. ``differences`` lists what changed."""

    def __init__(self, text: str, *, differences: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.differences = differences


class RankMismatchError(HalError):
    """Ranks of one job decided differently. ``differences`` lists them, a line each."""

    def __init__(self, text: str, *, differences: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.differences = differences


class InputError(HalError, ValueError):
    """Arguments of a call that do not fit the request. Raised before anything is written."""


class PlanMismatchError(InputError):
    """A plan was given to a handle that did not make it."""


class WorkspaceError(HalError):
    """A frozen work buffer was asked to grow. ``owner`` names who asked."""

    def __init__(self, text: str, *, owner: str = "") -> None:
        super().__init__(text)
        self.owner = owner
