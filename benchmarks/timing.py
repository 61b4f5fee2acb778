"""How the benchmarks here take times, and the rates of a device that they are held against.

On an accelerator the calls to be timed are captured in one graph, one behind the other, and the graph is replayed: no
launch is in the time. What cannot be captured is timed by events around the plain calls, and says so. Calls should go
through more memory than the cache holds. Several things are timed in turns, so that a slow moment meets them all.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Call", "Clock", "Timed", "reason_of"]

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timed:
    """``once`` gives seconds a call of one round over the calls; ``how`` is ``"graph"``, ``"events"`` or ``"wall"``."""

    once: Callable[[], float]
    how: str


class Clock:
    """Times on one device. ``quick``: few rounds, small rates; for trying things out, not for figures."""

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self._on_host = torch.device(device).type == "cpu"

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Ready to be timed: compiled, warm, and captured where that works."""
        for call in calls[:2]:
            call()
        if self._on_host:
            return Timed(lambda: _wall(calls), "wall")
        torch.cuda.synchronize()
        try:
            graph = _captured(calls)
        except RuntimeError as error:
            torch.cuda.synchronize()
            return Timed(lambda: _events(lambda: _all(calls)) / len(calls), f"events, since {reason_of(error)}")
        return Timed(lambda: _events(graph.replay) / len(calls), "graph")

    def in_turns(self, timed: Mapping[str, Timed], rounds: int = 9) -> dict[str, float]:
        """Median seconds of a call of each, measured in turns."""
        found: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(2 if self.quick else rounds):
            for name, one in timed.items():
                found[name].append(one.once())
        return {name: statistics.median(times) for name, times in found.items()}

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of a call."""
        return self.in_turns({"": self.prepare(calls)})[""]

    def cold(self, call: Call, milliseconds: int = 60) -> float:
        """Median seconds of a call that finds the cache flushed, measured for about so many milliseconds."""
        if self._on_host:
            return self.seconds([call])
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(call, warmup=10, rep=milliseconds, return_mode="median"))

    def enqueue(self, call: Call, count: int = 300) -> float:
        """Median seconds of the host to enqueue a call, while the device keeps up."""
        times = []
        for _ in range(20 if self.quick else count):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if len(times) % 50 == 0 and not self._on_host:
                torch.cuda.synchronize()
        return statistics.median(times)

    def copy_rate(self, num_bytes: int = 4 << 30) -> float:
        """Bytes a second of copies on the device, read and written ones together.

        Not captured: in a graph a copy is the copy engine's, which on an H200 moves 2.7 TB/s and not 4.3.
        """
        size = (1 << 20 if self.quick else num_bytes) // 2
        source = torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.cold(lambda: target.copy_(source))

    def matmul_rate(self) -> float:
        """FLOP a second of a bfloat16 product of two matrices of random numbers."""
        n = 256 if self.quick else 8192
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        return 2 * n**3 / self.seconds([lambda: a @ b])

    def name(self) -> str:
        """The device and the versions that figures depend on."""
        device = "CPU" if self._on_host else f"{torch.cuda.get_device_name()}, driver {_driver()}"
        return f"{device}, torch {torch.__version__}, triton {_triton()}"


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _all(calls[:2])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(calls)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _events(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _wall(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    _all(calls)
    return (time.perf_counter() - start) / len(calls)


def _driver() -> str:
    import hal

    return str(hal.device().driver)


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
