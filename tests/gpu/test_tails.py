"""On hardware: tensors with room for more tokens than a step has, which may hold anything there, through every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from every_kernel import BASE, faults, serving
from torch import Tensor

import hal
from hal._attention import for_step
from hal._plan import Buffers, make_step
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROOM = 64
LENGTHS = ([7, 1, 20], [1, 1, 1], [33], [5, 0, 9])
FILLINGS = (1e4, torch.inf, torch.nan)


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


def changed(outs: list[Tensor]) -> list[str]:
    """Which fillings had a part in the results of tokens that are a step's."""
    pairs = zip(FILLINGS, outs[1:], strict=True)
    return [f"WRONG with {filling} past the step" for filling, out in pairs if not torch.equal(out, outs[0])]


@pytest.mark.parametrize("fields", [{}, {"causal": False}, {"head_dim": 64}, {"window": (15, 0)}], ids=str)
def test_prefill(fields: dict[str, Any], device: hal.Device) -> None:  # requirement D15, E12, P37
    """As captured graphs call kernels. Eager calls of a handle give them the step's own tokens."""
    place = device.torch_device()

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, **more, **fields, "graph": True}, phases="prefill")

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        implementation = resolve_target(kernel.target)(asked, device)
        found = []
        for lengths in LENGTHS:
            count = sum(lengths)
            torch.manual_seed(0)
            heads = asked.num_q_heads, asked.num_kv_heads, asked.num_kv_heads
            three = [torch.randn(ROOM, h, asked.head_dim, device=place).bfloat16() for h in heads]
            step = make_step(lengths, lengths, torch.zeros(len(lengths), 4, dtype=torch.int32), 16, place)
            call = for_step(implementation, Buffers(4, ROOM, 4, place, ROOM).fill(step))
            outs = []
            for filling in (0.0, *FILLINGS):
                for x in three:
                    x[count:] = filling
                outs.append(call(*three)[:count].clone())
            found += [f"{fault}, lengths {lengths}" for fault in changed(outs)]
        return found

    served = [(k, r) for k, r in serving("attention", "prefill", request, device) if k.library != "reference"]
    assert served
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(wrong)


def steps(phase: str, graph: bool, size: int, place: Any) -> Iterator[Any]:
    """(the tokens that are a step's, the step)."""
    q_lens = [1, 1] if phase == "decode" else [3, 5]
    step = make_step(q_lens, [20, 9], torch.tensor([[0, 1], [2, 0]]).int(), size, place)
    yield sum(q_lens), Buffers(4, ROOM, 2, place, 1 if phase == "decode" else ROOM).fill(step) if graph else step


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("cache", [{}, {"kv_dtype": "float8_e4m3fn", "fp8_query": True}], ids=["16 bits", "FP8"])
@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_queries(phase: str, cache: dict[str, Any], graph: bool, device: hal.Device) -> None:
    # requirement D15, E12, P37, B6
    place = device.torch_device()

    def request(more: dict[str, Any]) -> Request:
        fields = {**BASE, "page_size": 16, "kv_layout": "NHD", "deterministic": True, **cache, **more, "graph": graph}
        return AttentionRequest(**fields, phases=phase)

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        call = resolve_target(kernel.target)(asked, device)
        torch.manual_seed(0)
        dtype = torch.float8_e4m3fn if cache else torch.bfloat16
        shape = (4, asked.page_size, asked.num_kv_heads, asked.head_dim)
        caches = [torch.randn(shape, device=place).to(dtype) for _ in "kv"]
        found = []
        for count, step in steps(phase, graph, asked.page_size, place):
            q = torch.randn(
                ROOM if phase == "extend" else 4, asked.num_q_heads, asked.head_dim, device=place
            ).bfloat16()
            outs = []
            for filling in (0.0, *FILLINGS):
                q[count:] = filling
                outs.append(call(q, *caches, step, call.plan(step))[:count].clone())
            found += changed(outs)
        return found

    served = [
        (k, r) for k, r in serving("attention", phase, request, device) if not r.sinks and k.library != "reference"
    ]
    assert served
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(wrong)
