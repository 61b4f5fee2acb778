"""Tuning: the kernels that can serve a request, timed on this machine. Only right ones are timed.

What is measured here, :mod:`hal._measurements` lets decide: by more than noise and margin, and only where the kernel is
verified on this device.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from typing import Any

from hal import _devices, _selection
from hal._device import Device
from hal._eligibility import Circumstances
from hal._kernel import Band, Kernel
from hal._ledger import identity
from hal._measurements import Measurement, Measurements, request_key
from hal._timing import REPEATS, Clock, Run, Times, check_repeats, in_turns, prepared
from hal.errors import DeviceError
from hal.testing._verify import circumstances, refusals, verify
from hal_ops import Op, Request

__all__ = ["tune"]

log = logging.getLogger("hal")


def tune(
    request: Request,
    *,
    device: Any = None,
    repeats: int = REPEATS,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time every kernel that can serve a request, phase by phase, and record the medians for selection.

    Fields left open are decided as :func:`hal.select` decides them. A kernel that is not yet verified for this very
    request on this device is verified first; one that fails gets no time and is quarantined. Samples of all kernels are
    taken in turns. Reference kernels are left out where there are others,
    and a phase with one kernel to choose from is not timed. Plans are not part of the time: they are made once a step.

    Args:
        device: anything :func:`hal.device` takes. repeats: samples a kernel, at least 4.
        progress: called with a line of text as the work goes on.

    Returns:
        The measurements that were recorded, in microseconds a call, by phase and declared order.

    Raises:
        DeviceError: the device is simulated, unusable, or not known well enough for times to be kept.
        ValueError: fewer than 4 repeats.
    """
    check_repeats(repeats)
    around = circumstances(_devices.device(device))
    _check_identity(around.device)
    say = progress or _silent
    selection = _selection.select(request, device=around.device)
    measured: list[Measurement] = []
    for phase in selection.choices:
        kernels = _contenders(selection.op, phase, selection.request, around, say)
        if len(kernels) > 1:
            measured += _measure(kernels, selection.op, selection.request, around.device, repeats, say)
    Measurements(around.settings.cache_dir() / "measurements.json").record(measured)
    return measured


def _silent(text: str) -> None:
    return None


def _check_identity(device: Device) -> None:
    unknown = {n: v for n, v in (("runtime", device.runtime), ("driver", device.driver)) if not v.known}
    if unknown:
        why = "; ".join(f"its {name} version is unknown ({version.reason})" for name, version in unknown.items())
        raise DeviceError(f"times on {device} cannot be kept: {why}, so that another one could not be told from it")


def _contenders(
    op: Op, phase: str, request: Request, around: Circumstances, say: Callable[[str], None]
) -> list[Kernel]:
    """The kernels of a phase that can serve the request here, all of them verified for it."""
    able = [k for k in around.registry.candidates(op.name, phase, around.device) if not refusals(k, request, around)]
    fast = [k for k in able if k.band != Band.REFERENCE]
    return [k for k in fast if len(fast) > 1 and _right(k, phase, request, around, say)]


def _right(kernel: Kernel, phase: str, request: Request, around: Circumstances, say: Callable[[str], None]) -> bool:
    row = around.ledger_row(kernel, request)
    if row is None:
        mine = request.replace(phases=(phase,)) if hasattr(request, "phases") else request
        verify(kernels=[kernel.name], requests=[mine], device=around.device, progress=say)
        row = around.ledger_row(kernel, request)
    if row is None or row.status != "verified":
        say(f"{kernel.name} gets no time: " + (row.detail.splitlines()[0] if row else "it could not be verified"))
        return False
    return True


def _measure(
    kernels: list[Kernel], op: Op, request: Request, device: Device, repeats: int, say: Callable[[str], None]
) -> list[Measurement]:
    clock = Clock(device.torch_device())
    runs = {k: run for k in kernels if (run := _prepared(k, op, request, device, clock)) is not None}
    return [_measurement(k, device, request, times) for k, times in in_turns(runs, clock, repeats, say).items()]


def _prepared(kernel: Kernel, op: Op, request: Request, device: Device, clock: Clock) -> Run | None:
    """The call, warm; None for a kernel that cannot do the size that is timed."""
    try:
        return prepared(kernel, op, request, device, clock)
    except Exception as error:
        log.warning("kernel %s gets no time: it fails at the size that is timed: %s", kernel.name, error, exc_info=True)
        return None


def _measurement(kernel: Kernel, device: Device, request: Request, times: Times) -> Measurement:
    return Measurement(
        kernel=kernel.name,
        key=identity(kernel, device),
        request=request_key(request),
        microseconds=times.microseconds,
        spread=times.spread,
        date=dt.date.today().isoformat(),
    )
