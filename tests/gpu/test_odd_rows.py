"""On hardware: rows that begin off 16 bytes, through handles of every kernel: right, or refused before the launch.

A kernel that loads 16 bytes at once stops with an error of the device there, after which the process can do nothing more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_kernel import BASE, WANTED, faults, serving
from torch import Tensor

import hal
from hal.errors import InputError
from hal_ops import Request
from hal_ops.attention import AttentionRequest

pytestmark = pytest.mark.gpu

GAPS: dict[str, dict[str, int]] = {
    "2 bytes on": {"begin": 1},
    "8 bytes on": {"begin": 4},
    "tokens 4 bytes further apart": {"apart": 2},
    "heads 8 bytes further apart": {"wider": 4},
    "gaps of 16 bytes": {"begin": 8, "apart": 8, "wider": 8},
}
TOKENS = 33


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


def spaced(x: Tensor, *, begin: int = 0, apart: int = 0, wider: int = 0) -> Tensor:
    """``x`` in memory of its own, ``begin`` elements on, with gaps of NaN behind each token and each head."""
    tokens, heads, dim = x.shape
    row = heads * (dim + wider)
    memory = torch.full((begin + tokens * (row + apart),), torch.nan, dtype=x.dtype, device=x.device)
    view = memory[begin:].view(tokens, row + apart)[:, :row].unflatten(1, (heads, -1))[..., :dim]
    return view.copy_(x)


@pytest.mark.parametrize("gaps", list(GAPS))
@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_they_are_right_or_refused(phase: str, gaps: str, device: hal.Device) -> None:  # requirement B3, C7
    place = device.torch_device()

    def fields(more: dict[str, Any]) -> dict[str, Any]:
        return {**BASE, "page_size": 16, "kv_layout": "NHD", **more}

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**fields(more), phases=phase)

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        more = fields(WANTED.get(kernel.library, {}))
        attn = hal.get_attention(**more, phases=phase, device=device, kernel={phase: kernel.name})
        torch.manual_seed(0)
        heads = asked.num_q_heads, asked.num_kv_heads, asked.num_kv_heads
        q, k, v = (torch.randn(TOKENS, h, asked.head_dim, device=place).bfloat16() for h in heads)
        extras = {"sinks": torch.zeros(asked.num_q_heads, device=place)} if asked.sinks else {}
        odd = [spaced(x, **GAPS[gaps]) for x in (q, k, v)]
        calls = prefills(attn, odd, (q, k, v)) if phase == "prefill" else steps(attn, phase, odd[0], q, k, v, extras)
        found = []
        for form, call, right in calls:
            try:
                out = call()
            except InputError as error:
                loose = kernel.row_alignment == 1 or gaps.startswith("gaps")
                found += [f"{form}: {error}"] if loose or "bytes at once" not in str(error) else []
            else:
                close = torch.allclose(out, right(), atol=1e-2, rtol=1e-2)
                found += [] if close else [f"{form}: WRONG"]
        return found

    served = [(k, r) for k, r in serving("attention", phase, request, device) if k.library != "reference"]
    assert len(served) > 1
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(wrong)


def prefills(attn: Any, odd: list[Tensor], plain: tuple[Tensor, ...]) -> list[Any]:
    """Ragged and dense: what to call, and what is right."""
    cu = torch.tensor([0, 9, TOKENS], dtype=torch.int32, device=plain[0].device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": TOKENS - 9, "max_seqlen_k": TOKENS - 9}
    return [
        ("ragged", lambda: attn(*odd, **lengths), lambda: attn(*plain, **lengths)),
        ("dense", lambda: attn(*(x[None] for x in odd)), lambda: attn(*(x[None] for x in plain))),
    ]


def steps(attn: Any, phase: str, odd: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]) -> list[Any]:
    """A step over a cache that is filled already."""
    cache = attn.allocate_kv_cache(4)
    size = cache.k.shape[1]
    pages = -(-TOKENS // size)
    for stored, x in ((cache.k, k), (cache.v, v)):
        stored[:pages].flatten(0, 1)[:TOKENS] = x
    table, count = [list(range(pages))], 1 if phase == "decode" else 7
    plan = attn.plan(q_lens=[count], kv_lens=[TOKENS], block_table=table)
    return [
        (
            "step",
            lambda: attn(odd[:count], cache=cache, plan=plan, **extras),
            lambda: attn(q[:count], cache=cache, plan=plan, **extras),
        )
    ]
