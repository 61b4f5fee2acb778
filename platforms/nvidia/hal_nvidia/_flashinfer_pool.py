"""flashinfer's wrapper objects and work buffers: who may use which, and when one may be used again.

A wrapper holds the metadata of one plan in buffers of its own: 8 MiB on the device and 8 MiB of page-locked host
memory. A plan therefore owns a wrapper for as long as it lives. Afterwards the wrapper is idle, for plans on the same
device and stream: what is still queued there runs before the next plan's copies.

``plan`` fills the page-locked buffer and starts a copy that runs when the stream gets there. To fill it again before
that would change the earlier plan, so an idle wrapper is taken only when its last copy has left.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import refuse_far
from hal_ops.attention import AttentionRequest

__all__ = [
    "Held",
    "Lease",
    "MOST_PROCESSORS",
    "ZEROED",
    "counters",
    "for_functions",
    "identity",
    "lease",
    "scratch",
    "scratch_size",
    "stream_of",
    "zeroed",
]

_MIB = 1 << 20
_TILES = (16, 64, 128)
"""Rows of a query tile (``FA2DetermineCtaTileQ`` of ``include/flashinfer/attention/scheduler.cuh``)."""
_BLOCKS_A_PROCESSOR = 2
_UNSIGNED = 1 << 32
MOST_PROCESSORS = 256
_FUNCTIONS = 128 * _MIB
"""What flashinfer recommends for its functions (``decode.py``, ``cudnn/decode.py``)."""
ZEROED = 8 * _MIB
"""Of a buffer that is zero at first, the part that functions rely on (``decode.py``, ``reserve 8MB for semaphore``)."""

Key = tuple[Any, ...]
_idle: dict[Key, deque[Held]] = {}
_zeroed: dict[tuple[torch.device, str], weakref.ref[Tensor]] = {}


@dataclasses.dataclass(slots=True)
class Held:
    """A wrapper, and what tells that its last plan's copies are done."""

    wrapper: Any
    copied: Any = None


class Lease:
    """One wrapper, held until the lease is gone."""

    __slots__ = ("__weakref__", "_held", "_near", "run", "tokens", "wrapper")

    def __init__(self, held: Held) -> None:
        self._held = held
        self.wrapper = held.wrapper
        self.run: Callable[..., Any] = held.wrapper.run
        self.tokens = 0
        """Query tokens that the wrapper is planned for."""
        self._near: tuple[int, ...] | None = None

    def plan(self, fill: Callable[[Any], None]) -> None:
        """Let ``fill`` plan the wrapper. Waits for nothing but copies of its last plan that are still queued."""
        if self._held.copied is not None:
            self._held.copied.synchronize()
        fill(self.wrapper)
        self._near = None
        self._held.copied = _mark(self.wrapper.device)

    def check_reach(self, q: Tensor) -> None:
        """Look at queries with gaps, once for those of a plan that are alike.

        Raises:
            ValueError: fa2 cannot reach them, see :func:`refuse_far`.
        """
        if q.stride() != self._near:
            refuse_far(q)
            self._near = q.stride()


def lease(key: Key, make: Callable[[], Any]) -> Lease:
    """An idle wrapper of this key, or a new one. ``key`` holds the stream, and all that ``make`` depends on."""
    idle = _idle.setdefault(key, deque())
    taken = Lease(_take(idle) or Held(make()))
    handing_back = weakref.finalize(taken, idle.append, taken._held)
    handing_back.atexit = False
    return taken


def _take(idle: deque[Held]) -> Held | None:
    """The first whose copies are done. ``deque`` is safe between threads, and in finalizers."""
    for _ in range(len(idle)):
        try:
            held = idle.popleft()
        except IndexError:
            return None
        if held.copied is None or held.copied.query():
            return held
        idle.append(held)
    return None


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def stream_of(device: torch.device) -> int:
    """The current stream's handle; 0 where there are no streams.

    ``torch.cuda.current_stream`` makes an object first, which takes ten times as long.
    """
    return 0 if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index or 0)


def scratch(device: torch.device, stream: int, num_bytes: int) -> Tensor:
    """The buffer for partial results of one stream, uint8: kernels on a stream run one after the other.

    Raises:
        WorkspaceError: the pool is frozen and the buffer would have to grow.
    """
    return hal.workspace(device).get(f"flashinfer, stream {stream:#x}", num_bytes)


def for_functions(device: torch.device, stream: int, num_bytes: int = 0) -> Tensor:
    """The buffer of the functions that leave anything in it, one a stream: what is recommended, if not more.

    Raises:
        WorkspaceError: as :func:`scratch`.
    """
    return hal.workspace(device).get(f"flashinfer functions, stream {stream:#x}", max(_FUNCTIONS, num_bytes))


def zeroed(device: torch.device, stream: int, num_bytes: int = 0) -> Tensor:
    """The same of the functions that count on zeros at the front of theirs, and leave zeros there.

    Raises:
        WorkspaceError: as :func:`scratch`.
    """
    owner = f"flashinfer functions with semaphores, stream {stream:#x}"
    return _with_zeros(device, owner, max(_FUNCTIONS, num_bytes), ZEROED)


def counters(device: torch.device, stream: int, num_bytes: int) -> Tensor:
    """A buffer of zeros, one a stream, of functions that leave zeros in it.

    Raises:
        WorkspaceError: as :func:`scratch`.
    """
    return _with_zeros(device, f"flashinfer counters, stream {stream:#x}", num_bytes, None)


def _with_zeros(device: torch.device, owner: str, num_bytes: int, front: int | None) -> Tensor:
    buffer = hal.workspace(device).get(owner, num_bytes)
    held = _zeroed.get((device, owner))
    if held is None or held() is not buffer:
        buffer[:front].zero_()
        _zeroed[device, owner] = weakref.ref(buffer)
    return buffer


def scratch_size(request: AttentionRequest, device: hal.Device, tokens: int = 1 << 20, batch: int = 0) -> int:
    """Bytes that a plan of ``tokens`` queries in ``batch`` rows may take for partial results.

    One accumulator and one logsumexp a query head and row of each tile that is in flight or, in a captured graph, of
    each tile that there can be (``PrefillPlan`` of ``scheduler.cuh``). ``DecodePlan`` takes one a block, of which a
    processor holds 16, as two of the smallest tiles have. The longest row that a graph may have is counted there in 32
    bits without a sign: fewer tokens than rows are very many, in the largest tiles.
    """
    packed = (tokens - batch + 1) % _UNSIGNED * request.group_size
    tile = next((t for t in _TILES if packed <= t), _TILES[-1])
    in_flight = _BLOCKS_A_PROCESSOR * (device.multiprocessors or MOST_PROCESSORS) // request.num_kv_heads + 1
    tiles = max(in_flight, -(-tokens * request.group_size // tile) + batch) if batch else in_flight
    return request.num_q_heads * tiles * tile * (request.v_head_dim + 1) * 4 + _MIB


def identity(make: Callable[..., Any]) -> tuple[Any, ...]:
    """What tells two factories of wrappers apart: the class and what it is called with."""
    assert isinstance(make, functools.partial)
    return (make.func, *make.args, *sorted(make.keywords.items()))
