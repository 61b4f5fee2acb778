"""The cache operations in Triton: write, rotary and write in one pass, page copies, gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops.attention import AttentionRequest
from hal_ops.attention.paged_inputs import block_tables, build_cache, slots_of
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.cases import make_case
from hal_ops.kv_cache.reference import write as reference_write
from hal_ops.kv_cache.triton_pages import copy_pages, gather
from hal_ops.kv_cache.triton_rotary import rotary_and_write
from hal_ops.kv_cache.triton_write import write
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.reference import rotary_embedding

WRITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "HND": {"kv_layout": "HND"},
    "page 1": {"page_size": 1},
    "page 48": {"page_size": 48},
    "page 256, HND": {"page_size": 256, "kv_layout": "HND"},
    "heads of 80": {"head_dim": 80, "num_kv_heads": 3},
    "heads of 13": {"head_dim": 13},
    "heads of 192/128": {"head_dim": 192, "v_head_dim": 128},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32 to float16": {"dtype": "float32", "kv_dtype": "float16"},
    "one head": {"num_kv_heads": 1},
    "e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    "e4m3fn a head, HND": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "kv_layout": "HND"},
    "e5m2 a head": {"kv_dtype": "float8_e5m2", "kv_scale": "head", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize("corner", WRITES)
def test_tokens_go_to_their_slots(
    corner: str, interleaved: bool, device: str, assert_right: Callable[[Any], None]
) -> None:  # requirement B6, D15
    base = {"num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
    request = KvCacheWriteRequest(**{**base, **WRITES[corner]})
    interleaved &= request.head_dim == request.v_head_dim
    case = make_case(request, device=device, interleaved=interleaved)
    assert_right(case.check(write(request, device)))


def test_views_of_a_fused_projection_are_written(device: str) -> None:
    request = KvCacheWriteRequest(num_kv_heads=2, head_dim=32, dtype="float32")
    fused = torch.randn(9, 4, 2, 32, device=device)
    slots = torch.randperm(48)[:9].to(device)
    caches = [[torch.zeros(3, 16, 2, 32, device=device) for _ in "kv"] for _ in range(2)]
    for make, pair in zip((write, reference_write), caches, strict=True):
        make(request, device)(fused[:, 1], fused[:, 2], *pair, slots)
    for found, right in zip(*caches, strict=True):
        assert torch.equal(found, right)


def test_slots_past_the_tokens_are_left_alone(device: str) -> None:  # requirement E12
    """A plan of maximum size has more slots than a smaller step has tokens."""
    request = KvCacheWriteRequest(num_kv_heads=2, head_dim=32, dtype="float32")
    tokens = torch.randn(3, 2, 2, 32, device=device)
    caches = [torch.zeros(2, 16, 2, 32, device=device) for _ in "kv"]
    slots = torch.tensor([5, 0, 31, -1, -1, -1, 7]).to(device)
    write(request, device)(tokens[:, 0], tokens[:, 1], *caches, slots)
    for cache, values in zip(caches, tokens.unbind(1), strict=True):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots[:3]], values)
        assert int(flat.ne(0).any(-1).any(-1).sum()) == 3


def test_a_cast_that_is_not_done_is_refused() -> None:
    request = KvCacheWriteRequest(num_kv_heads=1, head_dim=32, dtype="float64")
    with pytest.raises(ValueError, match="does not do dtype float64 into float64"):
        write(request, "cpu")


ROTARIES = {
    "neox": {},
    "interleaved": {"style": "interleaved"},
    "partial": {"rotary": 32},
    "partial, interleaved, HND": {"style": "interleaved", "rotary": 16, "layout": "HND"},
    "heads of 80/48": {"dim": 80, "v_dim": 48, "rotary": 80},
    "bfloat16": {"dtype": "bfloat16"},
    "e4m3fn": {"kv_dtype": "float8_e4m3fn", "scales": 1},
    "e4m3fn a head": {"kv_dtype": "float8_e4m3fn", "scales": 2, "layout": "HND"},
    "e4m3fn without scales": {"kv_dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("corner", ROTARIES)
def test_rotary_and_write_is_one_after_the_other(corner: str, in_place: bool, device: str) -> None:
    given = {"style": "neox", "rotary": 64, "layout": "NHD", "dim": 64, "dtype": "float32", "scales": 0}
    given |= ROTARIES[corner]
    dim, v_dim, dtype = given["dim"], given.get("v_dim", given["dim"]), given["dtype"]
    kv_dtype = given.get("kv_dtype", dtype)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(21, n, d, device=device).to(getattr(torch, dtype)) for n, d in ((6, dim), (2, dim), (2, v_dim))
    )
    cos, sin = (torch.rand(40, given["rotary"] // 2, device=device) for _ in range(2))
    positions = torch.randint(40, (21,), device=device)
    slots = torch.randperm(64)[:21].to(device)
    slots[::4] = -1
    scales = {}
    if given["scales"]:
        scales = {n: torch.tensor([0.5, 2.0][: given["scales"]], device=device) for n in ("k_scale", "v_scale")}
    request = RotaryEmbeddingRequest(
        num_q_heads=6, num_kv_heads=2, head_dim=dim, rotary_dim=given["rotary"], style=given["style"], dtype=dtype
    )
    to_write = KvCacheWriteRequest(
        num_kv_heads=2, head_dim=dim, v_head_dim=v_dim, dtype=dtype, kv_dtype=kv_dtype, kv_layout=given["layout"],
        kv_scale="head" if given["scales"] == 2 else "tensor",
    )  # fmt: skip
    turned_q, turned_k = rotary_embedding(request, device)(q, k, cos, sin, positions)
    pairs = [[_pages(4, 16, 2, d, given["layout"], kv_dtype, device) for d in (dim, v_dim)] for _ in range(2)]
    reference_write(to_write, device)(turned_k, v, *pairs[1], slots, **scales)
    before = k.clone()
    out = rotary_and_write(
        q, k, v, cos, sin, positions, *pairs[0], slots, kv_layout=given["layout"], style=given["style"],
        out=q if in_place else None, **scales,
    )  # fmt: skip
    assert (out is q) == in_place
    assert torch.equal(k, before)
    torch.testing.assert_close(out, turned_q)
    for found, right in zip(*pairs, strict=True):
        if kv_dtype == dtype:
            torch.testing.assert_close(found, right)
            continue
        steps = (found.view(torch.uint8).int() - right.view(torch.uint8).int()).abs()
        assert int(steps.max()) <= 1
        assert (steps == 0).float().mean() > 0.99


def _pages(pages: int, size: int, heads: int, dim: int, layout: str, dtype: str, device: str) -> torch.Tensor:
    middle = (size, heads) if layout == "NHD" else (heads, size)
    return torch.zeros(pages, *middle, dim, device=device).to(getattr(torch, dtype))


def test_rotary_and_write_says_what_does_not_fit(device: str) -> None:
    x, table, slots = torch.zeros(3, 1, 16, device=device), torch.zeros(4, 8, device=device), torch.arange(3).to(device)
    cache = torch.zeros(1, 16, 1, 16, device=device)
    with pytest.raises(ValueError, match="choose 'neox' or 'interleaved'"):
        rotary_and_write(x, x, x, table, table, slots, cache, cache, slots, style="gptj")
    with pytest.raises(ValueError, match=r"have \[2, 3\] tokens"):
        rotary_and_write(x, x, x, table, table, slots, cache, cache, slots[:2])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(9, 16, 2, 80), (9, 2, 48, 64), (9, 1, 1, 13)])
def test_pages_are_copied(shape: tuple[int, ...], dtype: str, device: str) -> None:
    torch.manual_seed(0)
    both = torch.randn(shape[0], 2, *shape[1:]).to(getattr(torch, dtype)).to(device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[both.itemsize]
    right = both.view(bits).clone()
    source, target = torch.tensor([1, 1, 4, -1, 5]).to(device), torch.tensor([0, 8, 2, 3, -1]).to(device)
    for at, to in ((1, 0), (1, 8), (4, 2)):
        right[to] = right[at]
    copy_pages(both.unbind(1), source, target)
    assert torch.equal(both.view(bits), right)


def test_copies_are_of_pairs(device: str) -> None:
    cache = torch.zeros(2, 1, 1, 4, device=device)
    with pytest.raises(ValueError, match="source has 1 pages, target 2"):
        copy_pages((cache,), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    none = torch.zeros(0, dtype=torch.int32, device=device)
    copy_pages((cache,), none, none)


@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("kv_dtype", "page_size"), [("float16", 16), ("float8_e4m3fn", 8), ("float32", 48)])
def test_rows_are_gathered(kv_dtype: str, page_size: int, layout: str, kv_scale: str, device: str) -> None:
    # requirement D15
    fp8 = kv_dtype.startswith("float8")
    dtype = "float16" if fp8 else kv_dtype
    request = AttentionRequest(
        num_q_heads=3, num_kv_heads=3, head_dim=40, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size,
        kv_layout=layout, kv_scale=kv_scale if fp8 else "tensor",
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    lengths = [(1, n) for n in (1, 15, 0, 16, 17, 49)]
    table, pages = block_tables(lengths, page_size, draw)
    slots = torch.cat([slots_of(row, page_size, 0, n) for row, (_, n) in zip(table, lengths, strict=True)])
    values = torch.randn(len(slots), 3, 40, generator=draw)
    values = values[torch.unique(slots, return_inverse=True)[1]]
    scale = torch.tensor([0.5, 2.0, 1.5])[: 3 if kv_scale == "head" else 1] if fp8 else None
    cache = build_cache(slots, values, pages, request, scale).to(device)
    cu = torch.tensor([0, *(n for _, n in lengths)]).cumsum(0).int().to(device)
    found = gather(
        cache, table.to(device), cu, total=len(slots), longest=49, kv_layout=layout,
        scale=None if scale is None else scale.to(device), dtype=getattr(torch, dtype),
    )  # fmt: skip
    torch.testing.assert_close(found.cpu().float(), values, rtol=0.07 if fp8 else 1e-3, atol=2e-2 if fp8 else 1e-3)


def test_nothing_is_gathered_from_empty_rows(device: str) -> None:
    cache = torch.zeros(1, 16, 2, 8, device=device)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    assert gather(cache, torch.zeros(2, 1).int().to(device), none, total=0, longest=0).shape == (0, 2, 8)
    with pytest.raises(ValueError, match="choose 'NHD' or 'HND'"):
        gather(cache, none.view(3, 1), none, total=0, longest=0, kv_layout="hnd")
