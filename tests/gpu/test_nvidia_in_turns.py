"""On NVIDIA hardware: paged plans of several libraries on two streams in turns. Fresh keys: ``test_nvidia_libraries.py``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal import testing
from hal.testing._verify import circumstances, refusals

pytestmark = pytest.mark.gpu

LIBRARIES = ("fa3", "flashinfer_fa2", "triton")
LENGTHS = ((700, 33, 1, 260), (17, 512, 90, 5))
PAGES = 44
"""Pages of 16 a row: room for the longest."""
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "kv_layout": "NHD"}


@pytest.fixture(scope="module")
def device() -> hal.Device:
    found = hal.devices("nvidia") if "nvidia" in {d.platform for d in hal.devices()} else ()
    if not found:
        pytest.skip("no NVIDIA device")
    for library in LIBRARIES:
        first = testing.corners(f"{library}.decode", limit=1)[0]
        why = refusals(hal._plugins.registry().kernels[f"{library}.decode"], first, circumstances(found[0]))
        if any(r.field in ("library", "device", "runtime") for r in why):
            pytest.skip("; ".join(map(str, why)))
    return found[0]


class Turn:
    """A library's decode on one stream: planned anew for each step or, in a graph, captured once and its plan refilled."""

    def __init__(self, handle: hal.Attention, q: Tensor, cache: hal.KVCache, table: Tensor, stream: Any) -> None:
        self.handle, self.table, self.stream = handle, table, stream
        self.call = functools.partial(handle, q, cache=cache)
        self.graph = None
        if handle.request.graph:
            with torch.cuda.stream(stream):
                self.plan = handle.plan(**self.step((16 * PAGES,) * 4), max_batch=4)
                self.call(plan=self.plan)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = self.call(plan=self.plan)

    def step(self, kv_lens: tuple[int, ...]) -> dict[str, Any]:
        return {"q_lens": [1] * 4, "kv_lens": kv_lens, "block_table": self.table}

    def __call__(self, which: int) -> Tensor:
        step = self.step(LENGTHS[which])
        with torch.cuda.stream(self.stream):
            if self.graph is None:
                out: Tensor = self.call(plan=self.handle.plan(**step))
                return out
            self.plan.update(**step)
            self.graph.replay()
            return self.out.clone()

    def alone(self, which: int) -> Tensor:
        torch.cuda.synchronize()
        out = self(which)
        torch.cuda.synchronize()
        return out


def turns_of(handles: list[hal.Attention], streams: list[Any]) -> list[Turn]:
    """Each library on each stream, over caches of their own that hold the same."""
    torch.manual_seed(0)
    place = handles[0].device.torch_device()
    q = torch.randn(4, 8, 128).bfloat16().to(place)
    pages = torch.randn(2, 4 * PAGES + 4, 16, 2, 128).bfloat16().to(place)
    table = torch.randperm(4 * PAGES + 4)[: 4 * PAGES].int().view(4, PAGES)
    found = []
    for index in range(2 * len(handles)):
        handle, stream = handles[index % len(handles)], streams[index % 2]
        cache = handle.allocate_kv_cache(4 * PAGES + 4)
        cache.k.copy_(pages[0])
        cache.v.copy_(pages[1])
        torch.cuda.synchronize()
        found.append(Turn(handle, q, cache, table, stream))
    return found


@pytest.mark.parametrize("graph", [False, True], ids=["planned", "captured"])
def test_paged_plans_of_three_libraries_on_two_streams_in_turns(graph: bool, device: hal.Device) -> None:
    # requirement C3, C5, D14, E12, P34, P36, P37, A5
    """Each gives what it gives alone. The streams are held up first, so that what is queued on both runs together."""
    settings = {**BASE, "phases": "decode", "deterministic": True, "graph": graph, "device": device}
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    turns = turns_of([hal.get_attention(**settings, kernel=library) for library in LIBRARIES], streams)
    alone = [[turn.alone(which) for which in (0, 1)] for turn in turns]
    for found in alone[1:]:
        torch.testing.assert_close(found, alone[0], atol=2e-2, rtol=2e-2)
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
    order = [(index, (index + again) % 2) for again in range(10) for index in range(len(turns))]
    outs = [turns[index](which) for index, which in order]
    torch.cuda.synchronize()
    wrong = [at for at, out in zip(order, outs, strict=True) if not torch.equal(out, alone[at[0]][at[1]])]
    assert not wrong
