"""Addresses past 2**31 within one page or token: the stride of whatever dim lies outermost is multiplied in 64 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.triton_write import write
from hal_ops.kv_pages_copy import KvPagesCopyRequest
from hal_ops.kv_pages_copy.triton_copy import kv_pages_copy
from hal_ops.kv_pages_gather import KvPagesGatherRequest
from hal_ops.kv_pages_gather.triton_gather import kv_pages_gather
from hal_ops.rotary_embedding import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.triton_rotary import rotary_embedding
from hal_ops.rotary_kv_cache_write import RotaryKvCacheWriteRequest
from hal_ops.rotary_kv_cache_write.triton_rotary_write import rotary_kv_cache_write

FAR = 320_000_000
"""Elements from one index of a tensor's second dim to the next: it fits 32 bits, and seven times it do not."""
OUTER, PAGES, TOKENS, DIM = 8, 3, 6, 32
CACHE: dict[str, Any] = {"num_kv_heads": 8, "head_dim": DIM, "page_size": 8, "kv_dtype": "float16"}

Make = Callable[..., Tensor]


@pytest.fixture
def far(device: str) -> Make:
    """Zeros ``[n, OUTER, ...]`` whose second dim lies outermost, all in one memory of which little is ever touched."""
    memory = torch.empty((OUTER - 1) * FAR + (1 << 17), dtype=torch.float16, device=device)
    taken = [0]

    def make(n: int, *rest: int) -> Tensor:
        inner = torch.empty((n, *rest), device="meta")
        strides = (inner.stride(0), FAR, *inner.stride()[1:])
        found = memory.as_strided((n, OUTER, *rest), strides, taken[0])
        taken[0] += inner.numel() + 16 - inner.numel() % 16
        return found.zero_()

    return make


def drawn(like: Tensor, seed: int) -> Tensor:
    """Contiguous random values of a tensor's shape."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=draw).to(like.dtype).to(like.device)


def both(far: Make, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """The same values far apart and side by side."""
    apart = far(*shape)
    near = drawn(apart, seed)
    return apart.copy_(near), near


@pytest.mark.parametrize("layout", ["HND", "NHD"], ids=["heads outermost", "slots outermost"])
def test_pages_are_copied_and_gathered(layout: str, far: Make, device: str) -> None:  # requirement D8
    (k, near_k), (v, near_v) = (both(far, seed, PAGES, 8, DIM) for seed in (0, 1))
    copy = kv_pages_copy(KvPagesCopyRequest(**CACHE, kv_layout=layout), device)
    gather = kv_pages_gather(KvPagesGatherRequest(**CACHE, kv_layout=layout), device)
    source, target = (torch.tensor([n], device=device) for n in (2, 0))
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([0, 20], dtype=torch.int32, device=device)
    found = []
    for caches in ((k, v), (near_k, near_v)):
        copy(*caches, source, target)
        found.append(gather(*caches, table, lengths, 20, 20))
    assert torch.equal(k, near_k)
    assert torch.equal(v, near_v)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert found[0][0].ne(0).all()


@pytest.mark.parametrize("layout", ["HND", "NHD"], ids=["heads outermost", "slots outermost"])
@pytest.mark.parametrize("turned", [False, True], ids=["write", "rotary and write"])
def test_keys_and_values_are_written(turned: bool, layout: str, far: Make, device: str) -> None:
    # requirement D8
    apart, near = zip(*(both(far, seed, TOKENS, DIM) for seed in range(3)), strict=True)
    caches = [far(PAGES, 8, DIM) for _ in "kv"]
    near_caches = [torch.zeros(PAGES, OUTER, 8, DIM, dtype=torch.float16, device=device) for _ in "kv"]
    slots = torch.tensor([23, 7, 0, 15, -1, 9], device=device)
    if not turned:
        call = write(KvCacheWriteRequest(**CACHE, dtype="float16", kv_layout=layout), device)
        call(*apart[1:], *caches, slots)
        call(*near[1:], *near_caches, slots)
    else:
        request = RotaryKvCacheWriteRequest(**CACHE, num_q_heads=8, dtype="float16", rotary_dim=16, kv_layout=layout)
        rotary = rotary_kv_cache_write(request, device)
        angles = torch.arange(64, device=device).view(8, 8) / 7
        rest = (angles.cos(), angles.sin(), torch.arange(TOKENS, device=device))
        found = rotary(*apart, *rest, *caches, slots, out=far(TOKENS, DIM))
        assert torch.equal(found, rotary(*near, *rest, *near_caches, slots))
    for cache, right in zip(caches, near_caches, strict=True):
        assert torch.equal(cache, right)
        assert right.ne(0).any()


@pytest.mark.parametrize("style", ["neox", "interleaved"])
def test_heads_outermost_are_turned(style: str, far: Make, device: str) -> None:
    fields = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": DIM, "rotary_dim": 16, "dtype": "float16"}
    turn = rotary_embedding(RotaryEmbeddingRequest(**fields, style=style), device)
    apart, near = zip(*(both(far, seed, TOKENS, DIM) for seed in range(2)), strict=True)
    angles = torch.arange(64, device=device).view(8, 8) / 7
    rest = (angles.cos(), angles.sin(), torch.arange(TOKENS, device=device))
    found = turn(*apart, *rest, out=(far(TOKENS, DIM), far(TOKENS, DIM)))
    assert all(torch.equal(x, y) for x, y in zip(found, turn(*near, *rest), strict=True))
