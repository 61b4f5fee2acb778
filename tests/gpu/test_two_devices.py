"""On a machine of two GPUs: handles, work buffers and launches on the one that is not the current device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal
from hal_ops._triton_gate import GateRows

pytestmark = pytest.mark.gpu

BASE: dict[str, Any] = {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64, "page_size": 16}
HEADS = (14, 2, 2)
BOUND = 1.5e-3


@pytest.fixture
def pair() -> Iterator[tuple[hal.Device, hal.Device]]:
    """Two devices of one platform; the first one is current, and has to be afterwards."""
    usable = [d for d in hal.devices() if d.platform != "cpu" and not d.unusable]
    alike = [d for d in usable if d.platform == usable[0].platform]
    if len(alike) < 2:
        pytest.skip("one usable accelerator: this needs two")
    module = torch.get_device_module(alike[0].torch_device())
    module.set_device(alike[0].index)
    yield alike[0], alike[1]
    assert module.current_device() == alike[0].index, "a call made another device the current one"


def on_host() -> Any:
    return hal.get_attention(**BASE, dtype="float32", device="cpu", kernel="reference")


def tensors(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, heads, 64).half() for heads in HEADS]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert not out.isnan().any()
    return float((out.float().cpu() - expected).norm() / expected.norm())


def chunks(handle: Any, three: list[torch.Tensor], bounds: list[int]) -> Iterator[torch.Tensor]:
    """The outputs of a sequence in steps of prompts and single tokens, over pages that are no run."""
    where = handle.device.torch_device()
    cache = handle.allocate_kv_cache(4)
    assert cache.k.device == where
    for a, b in itertools.pairwise(bounds):
        plan = handle.plan(q_lens=[b - a], kv_lens=[b], block_table=[[3, 0, 2]])
        yield handle(*(x[a:b].to(where) for x in three), cache=cache, plan=plan)


@pytest.mark.parametrize("kernel", [None, "triton"])
def test_a_handle_on_a_device_that_is_not_current(pair: tuple[hal.Device, hal.Device], kernel: str | None) -> None:
    # requirement X7, C3
    torch.manual_seed(0)
    other = pair[1]
    handle = hal.get_attention(**BASE, dtype="float16", device=other, kernel=kernel)
    assert handle.device == other
    dense = tensors(2, 70)
    out = handle(*(x.to(other.torch_device()) for x in dense))
    assert out.device == other.torch_device()
    assert error(out, on_host()(*(x.float() for x in dense))) < BOUND
    long = tensors(40)
    pieces = list(chunks(handle, long, [0, 20, 21, 22, 39, 40]))
    assert {piece.device for piece in pieces} == {other.torch_device()}
    assert error(torch.cat(pieces), on_host()(*(x.float()[None] for x in long))[0]) < BOUND


def test_each_tensor_is_served_on_its_own_device(pair: tuple[hal.Device, hal.Device]) -> None:  # requirement X7
    torch.manual_seed(0)
    three = tensors(1, 50)
    placed = {device: [x.to(device.torch_device()) for x in three] for device in pair}
    handles = {d: hal.get_attention(**BASE, dtype="float16", device=q[0]) for d, q in placed.items()}
    assert {d: h.device for d, h in handles.items()} == {d: d for d in pair}
    assert len({id(h) for h in handles.values()}) == len(pair)
    outs = [handles[device](*placed[device]) for device in pair]
    assert [out.device for out in outs] == [device.torch_device() for device in pair]
    with pytest.raises(hal.errors.InputError):
        handles[pair[0]](*placed[pair[1]])


@pytest.mark.parametrize("kernel", [None, "triton"])
def test_work_buffers_are_not_shared(pair: tuple[hal.Device, hal.Device], kernel: str | None) -> None:  # requirement C3
    """Steps of two handles in turns, with no wait between them: neither sees the other's scratch."""
    torch.manual_seed(0)
    long = {device: tensors(40) for device in pair}
    handles = {d: hal.get_attention(**BASE, dtype="float16", device=d, kernel=kernel) for d in pair}
    bounds = [0, 17, 18, 19, 35, 36, 37, 38, 39, 40]
    steps = zip(*(chunks(handles[d], long[d], bounds) for d in pair), strict=True)
    outs = list(zip(*steps, strict=True))
    for device, pieces in zip(pair, outs, strict=True):
        expected = on_host()(*(x.float()[None] for x in long[device]))[0]
        assert error(torch.cat(pieces), expected) < BOUND, device
    pools = [hal.workspace(device.torch_device()) for device in pair]
    assert pools[0] is not pools[1]
    for device, pool in zip(pair, pools, strict=True):
        assert {b.device for b in pool._buffers.values()} <= {device.torch_device()}
    pools[0].freeze()
    try:
        assert pools[1].get("a test", 1 << 10).device == pair[1].torch_device()
    finally:
        pools[0].thaw()


def test_a_launch_on_a_device_that_is_not_current(
    pair: tuple[hal.Device, hal.Device], monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement X7
    """Triton launches where its device is current; else the launch makes it so for that time. Once it is, what was
    compiled is launched at once."""
    other = pair[1].torch_device()
    gate = GateRows(pair[1], 96, "silu")
    first, asked = gate._launch._first, []
    monkeypatch.setattr(gate._launch, "_first", lambda *arguments: (asked.append(turn), first(*arguments)))
    module = torch.get_device_module(other)
    for turn in range(4):
        x = torch.randn(5 + turn, 192, device=other)
        out = torch.full((5 + turn, 96), float("nan"), device=other)
        with module.device(other if turn == 2 else pair[0].torch_device()):
            gate(x, out)
        a, b = x.cpu().chunk(2, dim=-1)
        torch.testing.assert_close(out.cpu(), torch.nn.functional.silu(a) * b, rtol=1e-5, atol=1e-5)
    assert asked == [0, 1, 3]
