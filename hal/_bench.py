"""Benchmarks: every kernel that can run for a request here, timed side by side. Nothing is chosen by what they say.

:mod:`hal._tune` measures for selection, and so verifies first. Here the question is what there is: a kernel that is not
verified is timed too, and its row says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

from hal import _devices, _plugins, _selection
from hal._eligibility import Circumstances
from hal._kernel import Band, Kernel
from hal._ledger import identity
from hal._timing import REPEATS, Clock, Run, Times, check_repeats, in_turns, prepared
from hal.testing._verify import circumstances, refusals
from hal_ops import Op, Request

__all__ = ["Row", "bench"]

log = logging.getLogger("hal")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel in one phase.

    Fields:
        kernel, phase: what was timed, and in which phase. request: the request as decided. sizes: the inputs, in words.
        microseconds, spread: median time of a call and its interquartile range; None where ``error`` says why not.
        ratio: the time over that of the phase's fastest kernel, which has 1.0.
        tflops, gbytes: 10^12 operations and 10^9 bytes a second; None for ops whose work nobody counts.
        known: ``"verified"`` or ``"failed"`` as the ledger says for this request here; else ``"not verified"``.
        identity: the device, its runtime and driver, and the versions of the libraries that the kernel needs.
    """

    kernel: str
    phase: str
    request: Request
    sizes: str = ""
    microseconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    known: str = ""
    error: str = ""
    identity: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "request": self.request.as_dict()}


def bench(
    request: Request,
    *,
    device: Any = None,
    kernels: tuple[str, ...] = (),
    repeats: int = REPEATS,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time every kernel that can run for a request on this machine, phase by phase, the fastest first.

    Fields left open are decided as :func:`hal.select` decides them. Reference kernels are timed only where there is
    nothing else, or where they are named. Nothing is recorded; plans are not part of the time.

    Args:
        device: anything :func:`hal.device` takes. kernels: only these kernels or libraries.
        repeats: samples a kernel, at least 4. progress: called with a line of text as the work goes on.

    Raises:
        DeviceError: the device is simulated or unusable.
        UnknownKernelError: a name of ``kernels`` is none.
        ValueError: fewer than 4 repeats.
    """
    check_repeats(repeats)
    for name in kernels:
        _plugins.registry().check_known(name, "hal bench")
    around = circumstances(_devices.device(device))
    selection = _selection.select(request, device=around.device)
    rows: list[Row] = []
    for phase in selection.choices:
        able = _able(selection.op, phase, selection.request, around, kernels)
        rows += _phase(able, selection.op, selection.request, around, repeats, progress or _silent)
    return rows


def _silent(text: str) -> None:
    return None


def _able(op: Op, phase: str, request: Request, around: Circumstances, names: tuple[str, ...]) -> list[Kernel]:
    asked = [k for k in around.registry.candidates(op.name, phase, around.device) if _asked(k, names)]
    able = [k for k in asked if not refusals(k, request, around)]
    return [k for k in able if names or k.band != Band.REFERENCE] or able


def _asked(kernel: Kernel, names: tuple[str, ...]) -> bool:
    return not names or any(map(kernel.answers_to, names))


def _phase(
    kernels: list[Kernel], op: Op, request: Request, around: Circumstances, repeats: int, say: Callable[[str], None]
) -> list[Row]:
    clock = Clock(around.device.torch_device())
    runs: dict[Kernel, Run] = {}
    failed: list[Row] = []
    for kernel in kernels:
        try:
            runs[kernel] = prepared(kernel, op, request, around.device, clock)
        except Exception as error:
            log.debug("%s fails at the size that is timed:", kernel.name, exc_info=True)
            lines = str(error).splitlines()
            text = f"{type(error).__name__}: {lines[0] if lines else ''}"
            failed.append(Row(kernel.name, kernel.phase, request, error=text, **_about(kernel, request, around)))
    times = in_turns(runs, clock, repeats, say)
    return [*_rows(times, runs, request, around), *failed]


def _rows(
    times: dict[Kernel, Times], runs: dict[Kernel, Run], request: Request, around: Circumstances
) -> Iterator[Row]:
    for kernel, taken in sorted(times.items(), key=lambda item: item[1].microseconds):
        case = runs[kernel].case
        flop, moved = case.flop(), case.num_bytes()
        yield Row(
            kernel=kernel.name,
            phase=kernel.phase,
            request=request,
            sizes=case.size(),
            microseconds=taken.microseconds,
            spread=taken.spread,
            ratio=round(taken.microseconds / min(t.microseconds for t in times.values()), 3),
            tflops=None if flop is None else _figure(flop / taken.microseconds / 1e6),
            gbytes=None if moved is None else _figure(moved / taken.microseconds / 1e3),
            **_about(kernel, request, around),
        )


def _figure(value: float) -> float:
    return float(f"{value:.4g}")


def _about(kernel: Kernel, request: Request, around: Circumstances) -> dict[str, Any]:
    row = around.ledger_row(kernel, request)
    known = "not verified" if row is None else row.status
    return {"known": known, "identity": identity(kernel, around.device)}
