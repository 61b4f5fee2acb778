"""On hardware: tensors with room for more tokens than a step has, which may hold anything there, through every kernel."""

from __future__ import annotations

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

pytestmark = pytest.mark.gpu

ROOM = 64
LENGTHS = ([7, 1, 20], [1, 1, 1], [33], [5, 0, 9])
FILLINGS = (1e4, torch.inf, torch.nan)
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


def changed(outs: list[Tensor]) -> list[str]:
    """Which fillings had a part in the results of tokens that are a step's."""
    pairs = zip(FILLINGS, outs[1:], strict=True)
    return [f"WRONG with {filling} past the step" for filling, out in pairs if not torch.equal(out, outs[0])]


def fill(x: Tensor, value: float) -> None:
    """Put a value everywhere; e4m3 has no infinity, and is given the other NaN, and its largest number."""
    if x.dtype == FP8:
        x.view(torch.uint8).fill_({0.0: 0x00, 1e4: 0x7E, torch.inf: 0xFF}.get(value, 0x7F))
    else:
        x.fill_(value)


@pytest.mark.parametrize(
    "fields",
    [{}, {"causal": False}, {"head_dim": 64}, {"window": (15, 0)}, {"qkv_dtype": "float8_e4m3fn"}],
    ids=str,
)
def test_prefill(fields: dict[str, Any], device: hal.Device) -> None:  # requirement D15, E12, P37
    """As captured graphs call kernels: no other request sees such tensors (:mod:`hal_ops.attention.contract`)."""
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
            dtype = FP8 if "qkv_dtype" in fields else torch.bfloat16
            three = [torch.randn(ROOM, h, asked.head_dim, device=place).to(dtype) for h in heads]
            step = make_step(lengths, lengths, torch.zeros(len(lengths), 4, dtype=torch.int32), 16, place)
            call = for_step(implementation, Buffers(4, ROOM, 4, place, ROOM).fill(step))
            outs = []
            for filling in (0.0, *FILLINGS):
                for x in three:
                    fill(x[count:], filling)
                outs.append(call(*three)[:count].clone())
            found += [f"{fault}, lengths {lengths}" for fault in changed(outs)]
        return found

    served = [(k, r) for k, r in serving("attention", "prefill", request, device) if k.library != "reference"]
    assert served
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(wrong)


@pytest.mark.parametrize("cache", [{}, {"kv_dtype": "float8_e4m3fn", "fp8_query": True}], ids=["16 bits", "FP8"])
@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_queries(phase: str, cache: dict[str, Any], device: hal.Device) -> None:
    # requirement D15, E12, P37, B6
    place = device.torch_device()

    def request(more: dict[str, Any]) -> Request:
        fields = {**BASE, "page_size": 16, "kv_layout": "NHD", "deterministic": True, **cache, **more, "graph": True}
        return AttentionRequest(**fields, phases=phase)

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        call = resolve_target(kernel.target)(asked, device)
        torch.manual_seed(0)
        dtype = FP8 if cache else torch.bfloat16
        shape = (4, asked.page_size, asked.num_kv_heads, asked.head_dim)
        caches = [torch.randn(shape, device=place).to(dtype) for _ in "kv"]
        q_lens, tokens = ([1, 1], 4) if phase == "decode" else ([3, 5], ROOM)
        step = make_step(q_lens, [20, 9], torch.tensor([[0, 1], [2, 0]]).int(), asked.page_size, place)
        fixed = Buffers(4, tokens, 2, place, 1 if phase == "decode" else tokens).fill(step)
        q = torch.randn(tokens, asked.num_q_heads, asked.head_dim, device=place).bfloat16()
        outs = []
        for filling in (0.0, *FILLINGS):
            q[sum(q_lens) :] = filling
            outs.append(call(q, *caches, fixed, call.plan(fixed))[: sum(q_lens)].clone())
        return changed(outs)

    served = [
        (k, r) for k, r in serving("attention", phase, request, device) if not r.sinks and k.library != "reference"
    ]
    assert served
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(wrong)
