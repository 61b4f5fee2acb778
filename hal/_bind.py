"""Binding: import and construct the chosen kernels, once, before anything runs."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from hal import _selection
from hal._device import Device
from hal._kernel import Band, Kernel
from hal._reason import Reason
from hal._selection import Selection
from hal.errors import DeviceError, NoKernelError
from hal_ops import Op, Request, resolve_target

__all__ = ["bind", "fallback_counts"]

log = logging.getLogger("hal")
fallback_counts: Counter[str] = Counter()
"""How often a reference kernel was bound without being asked for, by kernel name."""


def bind(decide: Callable[[], Selection]) -> tuple[Selection, dict[str, Any]]:
    """Make the kernels of a selection: phase to implementation.

    A kernel whose code cannot be imported or constructed is reported at WARNING, remembered as a reason, and the
    decision is made again without it, unless it was forced: then it is an error.

    Raises:
        DeviceError: the device is simulated and its torch device does not exist here.
        NoKernelError: nothing is left, or a forced kernel failed.
    """
    while True:
        selection = _selection.require(decide())
        _check_runnable(selection.device)
        made: dict[str, Any] = {}
        for phase, choice in selection.choices.items():
            assert choice.kernel is not None
            reason = _make(choice.kernel, selection, made, phase)
            if reason is not None:
                _give_up(choice.kernel, reason, selection, forced=choice.forced is not None)
                break
        else:
            _warn_fallbacks(selection)
            return selection, made


def _check_runnable(device: Device) -> None:
    if device.simulated and device.torch_type != "cpu":
        raise DeviceError(
            f"{device} is simulated: hal.select() and `hal explain` answer for it, but nothing can run on it; "
            "leave the simulation, or pass a real device"
        )


def _make(kernel: Kernel, selection: Selection, made: dict[str, Any], phase: str) -> Reason | None:
    try:
        made[phase] = build(kernel, selection.op, selection.request, selection.device)
    except ImportError as error:
        return Reason("import_error", f"importing {kernel.target} failed: {classify(error)}: {error}", "library")
    except (Exception, SystemExit) as error:
        log.warning("kernel %s could not be made", kernel.name, exc_info=True)
        return Reason("plugin_failed", f"{kernel.target} failed: {type(error).__name__}: {error}", "library")
    return None


def build(kernel: Kernel, op: Op, request: Request, device: Device) -> Any:
    """Import a kernel's factory, call it, and hold what it returns against the op's contract.

    Raises:
        ImportError: its module cannot be imported.
        TypeError: what it returns lacks a keyword or an attribute that the op's front door relies on.
    """
    made = resolve_target(kernel.target)(request, device)
    keywords = (*op.keywords.get(kernel.phase, ()), *request.extra_keywords(kernel.phase))
    problems = _contract_problems(made, keywords, op.attributes.get(kernel.phase, ()))
    if problems:
        raise TypeError(f"{kernel.target} returns what op {op.name} cannot call: {'; '.join(problems)}")
    return made


def _contract_problems(made: Any, keywords: tuple[str, ...], attributes: tuple[str, ...]) -> list[str]:
    problems = [f"no attribute {name!r}" for name in attributes if not hasattr(made, name)]
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(made).parameters
    except ValueError:
        return problems
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        problems.append("it takes **keywords, which could swallow an argument")
    return problems + [f"no keyword {name!r}" for name in keywords if name not in parameters]


def classify(error: ImportError) -> str:
    """What kind of import failure this is, in words."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        return "missing module"
    if "undefined symbol" in text:
        return f"built against another torch (undefined symbol; torch here is {_torch_version()})"
    if "cannot open shared object" in text or "DLL load failed" in text:
        return "missing shared library"
    return "import error"


def _torch_version() -> str:
    from hal._libraries import installed

    return str(installed("torch") or "not installed")


def _give_up(kernel: Kernel, reason: Reason, selection: Selection, *, forced: bool) -> None:
    _selection.failures.add(kernel, selection.request, selection.device, reason)
    if not forced:
        log.warning("kernel %s is passed over: %s", kernel.name, reason)
        return
    sources = sorted({c.forced.source for c in selection.choices.values() if c.forced and c.kernel is kernel})
    raise NoKernelError(
        f"{' and '.join(sources)} asks for {kernel.name}, and it cannot be used: {reason}\n"
        "next step: repair the installation, or unset what forces it",
        selection=selection,
    )


def _warn_fallbacks(selection: Selection) -> None:
    for choice in selection.choices.values():
        if choice.kernel is None or choice.kernel.band != Band.REFERENCE or choice.forced is not None:
            continue
        first = choice.kernel.name not in fallback_counts
        fallback_counts[choice.kernel.name] += 1
        if first or log.isEnabledFor(logging.DEBUG):
            why = "; ".join(f"{c.kernel.name}: {c.reasons[0]}" for c in choice.candidates if c.status == "refused")
            log.warning(
                "%s runs on the slow reference kernel %s on %s, since nothing better fits (%s). "
                "`hal explain` and handle.explain() say more; HAL_STRICT=1 makes this an error",
                selection.op.name,
                choice.kernel.name,
                selection.device,
                why or "no other kernel is registered",
            )
