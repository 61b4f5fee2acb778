"""What goes from the host to a device without waiting: from memory that nobody else writes, and pinned where it is large."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal
from hal_ops.uploads import STAGED, staged

CUDA = torch.device("cuda", 0)
LARGE = STAGED // 4 + 1


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that were asked for in pinned memory, which needs a device: here they are of the plain kind."""
    real, made = torch.empty, []

    def empty(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        found = real(*size, **more)
        if pin_memory:
            made.append(found.shape)
        return found

    monkeypatch.setattr(torch, "empty", empty)
    return made


def test_large_ones_are_pinned_and_small_ones_are_not(pinned: list[torch.Size]) -> None:
    small, large = torch.arange(4), torch.arange(LARGE, dtype=torch.int32)
    assert staged(small, CUDA) is small
    found = staged(large.view(1, -1), CUDA)
    assert torch.equal(found[0], large)
    assert found.data_ptr() != large.data_ptr()
    assert pinned == [(1, LARGE)]


def test_what_others_write_is_copied(pinned: list[torch.Size]) -> None:
    for given in (torch.arange(4), torch.arange(2 * LARGE, dtype=torch.int32)):
        found = staged(given, CUDA, own=False)
        given.zero_()
        assert found[1] == 1
    assert len(pinned) == 1


def test_nothing_is_done_for_other_devices(pinned: list[torch.Size]) -> None:
    large = torch.arange(2 * LARGE)
    for device in (torch.device("cpu"), torch.device("meta")):
        assert staged(large, device, own=False) is large
    assert staged(large.to("meta"), CUDA).device.type == "meta"
    assert not pinned


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["decode", "extend", "prefill"])
def test_a_large_plan_waits_for_nothing_and_keeps_what_it_was_given(phase: str) -> None:  # requirement P38
    """While the device is busy; the table is in memory that its owner pinned and writes right afterwards."""
    handle = hal.get_attention(num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", page_size=16)
    if handle.device.torch_type != "cuda":
        pytest.skip("no stream of CUDA's or HIP's")
    rows, pages, most = 600, 64, handle.request.max_q_len
    q_lens = [most if phase == "decode" else 20 - row % 7 for row in range(rows)]
    kv_lens = q_lens if phase == "prefill" else [pages * 16 - row % 16 for row in range(rows)]
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages).pin_memory()
    wanted = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=table.tolist(), phase=phase)._step
    plan = handle.plan(
        q_lens=q_lens, kv_lens=kv_lens, block_table=table, phase=phase, max_batch=rows, max_tokens=sum(q_lens)
    )
    # The first time memory is pinned, which may wait itself.
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 31)
        done = torch.cuda.Event()
        done.record()
        made = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=table, phase=phase)
        plan.update(q_lens=q_lens, kv_lens=kv_lens, block_table=table)
        waited = done.query()
    table.zero_()
    torch.cuda.synchronize()
    assert not waited, "the plan waited for what ran on the device"
    for step in (made._step, plan._step):
        assert torch.equal(step.block_table, wanted.block_table)
        assert torch.equal(step.slot_mapping, wanted.slot_mapping)
        assert torch.equal(step.cu_seqlens_k, wanted.cu_seqlens_k)
