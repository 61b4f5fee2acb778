"""On real hardware: every kernel of latent attention that this device can use, against the reference on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal
from hal import testing
from hal_ops.mla_attention import PHASES, MlaAttentionRequest

pytestmark = pytest.mark.gpu

BASE: dict[str, Any] = {"num_q_heads": 16, "page_size": 32}
BOUND = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}


def usable(phase: str, **fields: Any) -> Iterator[hal.Kernel]:
    """Kernels that this machine has for a plain request; asked when tests run, since collecting must touch no device."""
    selection = hal.select(MlaAttentionRequest(**{**BASE, **fields}))
    for candidate in selection.choices[phase].candidates:
        if candidate.status != "refused":
            yield candidate.kernel


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kernel_is_right_at_the_corners_of_its_declaration(phase: str, dtype: str, subtests: Any) -> None:
    device = hal.device()
    for kernel in usable(phase, dtype=dtype):
        for request in testing.corners(kernel, device=device, limit=24):
            if getattr(request, "dtype", None) != dtype:
                continue
            with subtests.test(kernel=kernel.name, request=request.describe()):
                result = testing.check(kernel, request, device=device)
                assert result.ok, str(result)


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("heads", [16, 128])
def test_a_sequence_in_steps_equals_the_host(dtype: torch.dtype, heads: int) -> None:
    torch.manual_seed(0)
    handle = hal.get_mla_attention(num_q_heads=heads, dtype=dtype, max_q_len=2)
    where, size = handle.device.torch_device(), handle.request.page_size
    assert handle.device.platform != "cpu"
    q, latent = torch.randn(140, heads, 576).to(dtype), torch.randn(140, 576).to(dtype)
    table = [torch.randperm(-(-140 // size)).tolist()]
    cache = handle.allocate_kv_cache(len(table[0]) + 1)
    cache.data.fill_(float("nan"))
    pieces = []
    for start, end in ((0, 130), (130, 131), (131, 133), (133, 140)):
        plan = handle.plan(q_lens=[end - start], kv_lens=[end], block_table=table)
        pieces.append(handle(q[start:end].to(where), latent[start:end].to(where), cache=cache, plan=plan))
    host = hal.get_mla_attention(num_q_heads=heads, dtype="float32", device="cpu", kernel="reference", page_size=size)
    wide = host.allocate_kv_cache(len(table[0]))
    plan = host.plan(q_lens=[140], kv_lens=[140], block_table=table)
    expected = host(q.float(), latent.float(), cache=wide, plan=plan)
    found = torch.cat(pieces).float().cpu()
    assert not found.isnan().any()
    assert float((found - expected).norm() / expected.norm()) < BOUND[dtype]


def test_a_captured_graph_serves_other_steps() -> None:
    device = hal.device()
    if device.torch_type != "cuda":
        pytest.skip("torch.cuda.CUDAGraph is what captures here")
    for kernel in usable("decode", graph=True):
        torch.manual_seed(0)
        names = {"decode": kernel.name}
        handle = hal.get_mla_attention(**BASE, graph=True, phases=("decode",), kernel=names)
        cache = handle.allocate_kv_cache(40)
        cache.data.normal_()
        table = torch.randperm(40)[:36].view(4, 9).tolist()
        q = torch.randn(4, 16, 576, dtype=torch.bfloat16, device=device.torch_device())
        plan = handle.plan(q_lens=[1] * 4, kv_lens=[144] * 4, block_table=table, max_batch=4)
        handle(q, cache=cache, plan=plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = handle(q, cache=cache, plan=plan)
        for kv_lens in ([144, 3, 16, 17], [1, 100, 129, 50]):
            plan.update(q_lens=[1] * 4, kv_lens=kv_lens, block_table=table)
            graph.replay()
            eager = handle(q, cache=cache, plan=plan)
            torch.cuda.synchronize()
            torch.testing.assert_close(out, eager, atol=2e-2, rtol=2e-2)
