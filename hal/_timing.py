"""Timing kernels: samples of all of them in turns, on the device's own clock. ``hal tune`` and ``hal bench`` use it."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hal import _bind
from hal._device import Device
from hal._kernel import Kernel
from hal.testing._cases import Planned, make_timing_case
from hal_ops import Op, Request

if TYPE_CHECKING:
    import torch

__all__ = ["Clock", "REPEATS", "Run", "Times", "check_repeats", "in_turns", "prepared"]

REPEATS = 30
WARM_UP = 3
SAMPLE_SECONDS = 0.5e-3
"""A sample repeats the call until it takes about this long, so that the clock's grain does not show."""
_TOLD = 10
"""Samples between two words on how far it is; the last one is told too."""

log = logging.getLogger("hal")


@dataclasses.dataclass(frozen=True)
class Times:
    """Median time of a call and the interquartile range, in microseconds."""

    microseconds: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A call that is warm, of one kernel on the case that is timed."""

    call: Callable[[], Any]
    case: Any


def check_repeats(repeats: int) -> None:
    """Refuse numbers of samples that have no quartiles.

    Raises:
        ValueError: fewer than 4.
    """
    if repeats < 4:
        raise ValueError(f"repeats={repeats}: quartiles take at least 4 samples")


def prepared(kernel: Kernel, op: Op, request: Request, device: Device, clock: Clock) -> Run:
    """The call, warm, at the size that is timed. What it raises is what the kernel raises.

    Its plan is made once, and is not part of the time: engines make one a step.
    """
    case = make_timing_case(op, request, kernel.phase, device.torch_device())
    implementation = Planned(_bind.build(kernel, op, request, device))
    for _ in range(WARM_UP):
        case.call(implementation)
    clock.wait()
    return Run(lambda: case.call(implementation), case)


def in_turns(runs: Mapping[Kernel, Run], clock: Clock, repeats: int, say: Callable[[str], None]) -> dict[Kernel, Times]:
    """Samples of all kernels in turns, each turn beginning with another, so that a clock that drifts treats all alike."""
    samples: dict[Kernel, list[float]] = {k: [] for k in runs}
    counts = {k: clock.calls_a_sample(run.call) for k, run in runs.items()}
    order = list(runs)
    for turn in range(repeats):
        if turn % _TOLD == 0 or turn + 1 == repeats:
            say(f"{', '.join(k.name for k in runs)}: sample {turn + 1}/{repeats}")
        for kernel in order[turn % len(order) :] + order[: turn % len(order)]:
            samples[kernel].append(clock.seconds(runs[kernel].call, counts[kernel]) / counts[kernel])
    return {kernel: _times(taken) for kernel, taken in samples.items()}


def _times(seconds: list[float]) -> Times:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(round(middle * 1e6, 3), round((high - low) * 1e6, 3))


class Clock:
    """Times calls on a device: by its own events where it has them, else by the host's clock around a wait."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._module = torch.get_device_module(device.type)
        self._events = device.type != "cpu" and hasattr(self._module, "Event")

    def wait(self) -> None:
        """Until everything that was started is done."""
        self._module.synchronize()

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        """How long some calls take, one after another."""
        self.wait()
        if not self._events:
            start = time.perf_counter()
            _repeat(run, calls)
            self.wait()
            return time.perf_counter() - start
        first, last = (self._module.Event(enable_timing=True) for _ in range(2))
        first.record()
        _repeat(run, calls)
        last.record()
        self.wait()
        return float(first.elapsed_time(last)) / 1e3

    def calls_a_sample(self, run: Callable[[], Any]) -> int:
        """How many calls take about :data:`SAMPLE_SECONDS`."""
        return max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(self.seconds(run, 1), 1e-7))))


def _repeat(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()
