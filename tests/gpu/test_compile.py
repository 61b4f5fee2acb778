"""On real hardware: handles that ``torch.compile(fullgraph=True)`` traces compute what the plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hal

pytestmark = pytest.mark.gpu

BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
TABLE = [[5, 1, 4], [0, 3, 2]]
LENGTHS = (((5, 3), (5, 3)), ((3, 4), (8, 7)), ((1, 1), (9, 8)), ((2, 2), (11, 10)))
CLOSE: dict[str, Any] = {"atol": 2e-2, "rtol": 2e-2}


@pytest.fixture(autouse=True)
def no_graphs_kept() -> None:
    torch._dynamo.reset()


def tensors(*lead: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    where = hal.device().torch_device()
    return [torch.randn(*lead, heads, 64, generator=draw).to(where, torch.bfloat16) for heads in (8, 2, 2)]


def fresh(attn: hal.Attention, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    ragged = attn(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=40, max_seqlen_k=40)
    return attn(q[None] * 2, k[None], v[None]) + 1, ragged * 2


@pytest.mark.parametrize("kernel", [None, "triton"])
def test_fresh_calls(kernel: str | None) -> None:
    given = {**BASE, "phases": "prefill", "kernel": kernel}
    plain, node = hal.get_attention(**given), hal.get_attention(**given, compile=True)
    lengths = torch.tensor([0, 33, 73], dtype=torch.int32, device=hal.device().torch_device())
    args = (*tensors(73), lengths)
    found = torch.compile(lambda *xs: fresh(node, *xs), fullgraph=True)(*args)
    torch.testing.assert_close(found, fresh(plain, *args), **CLOSE)


def test_gradients_come_from_the_engines_own_threads() -> None:
    given = {**BASE, "phases": "prefill", "needs_grad": True}
    plain, node = hal.get_attention(**given), hal.get_attention(**given, compile=True)

    def gradients(attn: hal.Attention, compiled: bool) -> list[Tensor | None]:
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.as_tensor(attn(q * 2, k, v)).float().sin().sum()

        leaves = [x.requires_grad_() for x in tensors(2, 65)]
        step: Callable[..., Any] = torch.compile(loss, fullgraph=True) if compiled else loss
        torch.autograd.backward(step(*leaves))
        return [x.grad for x in leaves]

    right = gradients(plain, compiled=False)
    assert all(x is not None and x.ne(0).any() for x in right)
    for compiled in (False, True):
        torch.testing.assert_close(gradients(node, compiled), right, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kernel", [None, "triton"])
@pytest.mark.parametrize("fields", [{}, {"kv_layout": "HND", "kv_dtype": "float8_e4m3fn"}], ids=["NHD", "HND, e4m3"])
def test_planned_calls(fields: dict[str, Any], kernel: str | None) -> None:  # requirement E12
    """Prefill, extend, two decode steps and a call over what is cached, through one compiled function."""
    given = {**BASE, "page_size": 16, "max_q_len": 2, "kernel": kernel, **fields}
    plain, node = hal.get_attention(**given), hal.get_attention(**given, compile=True)

    def step(attn: hal.Attention) -> Callable[..., Any]:
        return lambda q, k, v, cache, plan: attn(q * 1, k, v, cache=cache, plan=plan) + 1

    def serve(attn: hal.Attention, call: Callable[..., Any]) -> list[Tensor]:
        cache, outs = attn.allocate_kv_cache(6), []
        for seed, (q_lens, kv_lens) in enumerate(LENGTHS):
            plan = attn.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE)
            q, k, v = tensors(sum(q_lens), seed=seed)
            outs.append(call(q, k, v, cache, plan))
        return [*outs, call(q, None, None, cache, plan)]

    found = serve(node, torch.compile(step(node), fullgraph=True))
    torch.testing.assert_close(found, serve(plain, step(plain)), **CLOSE)


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul"])
def test_row_ops(name: str) -> None:
    given: dict[str, Any] = {"hidden_size": 512, "dtype": "bfloat16"}
    plain, node = hal.get_op(name, **given), hal.get_op(name, **given, compile=True)
    x = torch.randn(
        9, 1024 if name == "silu_and_mul" else 512, dtype=torch.bfloat16, device=plain.device.torch_device()
    )
    args = (x,) if name == "silu_and_mul" else (x, x[0].clone())
    found = torch.compile(lambda *xs: node(*xs) + 1, fullgraph=True)(*args)
    torch.testing.assert_close(found, plain(*args) + 1, **CLOSE)
