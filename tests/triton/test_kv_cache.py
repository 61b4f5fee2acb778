"""The cache operations in Triton: write, rotary and write in one pass, page copies, gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.kv_cache.cases import make_case
from hal_ops.kv_cache.reference import write as reference_write
from hal_ops.kv_cache.triton_write import write
from hal_ops.kv_pages_copy import KvPagesCopyRequest
from hal_ops.kv_pages_copy.cases import make_case as make_copy_case
from hal_ops.kv_pages_copy.triton_copy import kv_pages_copy
from hal_ops.kv_pages_gather import KvPagesGatherRequest
from hal_ops.kv_pages_gather.cases import make_case as make_gather_case
from hal_ops.kv_pages_gather.triton_gather import kv_pages_gather
from hal_ops.rotary_kv_cache_write import RotaryKvCacheWriteRequest
from hal_ops.rotary_kv_cache_write.cases import make_case as make_rotary_case
from hal_ops.rotary_kv_cache_write.triton_rotary_write import rotary_kv_cache_write

WRITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "HND": {"kv_layout": "HND"},
    "HDN": {"kv_layout": "HDN"},
    "HDN, heads of 80/48, page 48": {"kv_layout": "HDN", "head_dim": 80, "v_head_dim": 48, "page_size": 48},
    "HDN, float32 to float16": {"kv_layout": "HDN", "dtype": "float32", "kv_dtype": "float16", "num_kv_heads": 3},
    "HDN, e4m3fn a head": {"kv_layout": "HDN", "kv_dtype": "float8_e4m3fn", "kv_scale": "head"},
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


ROTARIES: dict[str, dict[str, Any]] = {
    "neox": {},
    "interleaved": {"style": "interleaved"},
    "partial": {"rotary_dim": 32},
    "partial, interleaved, HND": {"style": "interleaved", "rotary_dim": 16, "kv_layout": "HND"},
    "heads of 80/48": {"head_dim": 80, "v_head_dim": 48},
    "14 heads over 1": {"num_q_heads": 14, "num_kv_heads": 1, "page_size": 48},
    "bfloat16": {"dtype": "bfloat16", "table_dtype": "bfloat16"},
    "float32 to float16": {"dtype": "float32", "kv_dtype": "float16"},
    "e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    "e4m3fn a head, HND": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "kv_layout": "HND"},
    "e5m2 a head": {"kv_dtype": "float8_e5m2", "kv_scale": "head", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("form", ["plain", "strided", "out", "inplace"])
@pytest.mark.parametrize("corner", ROTARIES)
def test_rotary_and_write(corner: str, form: str, device: str, assert_right: Callable[[Any], None]) -> None:
    # requirement B6, D15
    base = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"}
    request = RotaryKvCacheWriteRequest(**{**base, **ROTARIES[corner]})
    implementation = rotary_kv_cache_write(request, device)
    for seed in (0, 1):
        assert_right(make_rotary_case(request, device=device, seed=seed, form=form).check(implementation))


def test_positions_outside_the_tables_read_nothing(device: str) -> None:
    request = RotaryKvCacheWriteRequest(num_q_heads=1, num_kv_heads=1, head_dim=16, dtype="float32", page_size=4)
    x, table = torch.ones(4, 1, 16, device=device), torch.ones(4, 8, device=device)
    caches = [torch.zeros(1, 4, 1, 16, device=device) for _ in "kv"]
    positions = torch.tensor([0, -1, 4, 2**40]).to(device)
    out = rotary_kv_cache_write(request, device)(x, x, x, table, table, positions, *caches, torch.arange(4).to(device))
    for found in (out, caches[0].flatten(0, 1)):
        assert found.isnan().all(-1).flatten().tolist() == [False, True, True, True]
    assert bool((caches[1] == 1).all())


def test_rotary_and_write_says_what_does_not_fit(device: str) -> None:
    request = RotaryKvCacheWriteRequest(num_q_heads=1, num_kv_heads=1, head_dim=16, dtype="float32")
    call = rotary_kv_cache_write(request, device)
    x, table, slots = torch.zeros(3, 1, 16, device=device), torch.zeros(4, 8, device=device), torch.arange(3).to(device)
    cache = torch.zeros(1, 16, 1, 16, device=device)
    with pytest.raises(RuntimeError, match="this kernel has no backward"):
        call(x.clone().requires_grad_(), x, x, table, table, slots, cache, cache, slots)
    none = call(x[:0], x[:0], x[:0], table, table, slots[:0], cache, cache, slots[:0])
    assert none.shape == (0, 1, 16)
    with pytest.raises(ValueError, match="does not do dtype float64 into float64"):
        rotary_kv_cache_write(request.replace(dtype="float64", kv_dtype="float64"), device)


PAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "HND": {"kv_layout": "HND"},
    "page 1, heads of 13": {"page_size": 1, "head_dim": 13},
    "page 48, heads of 80/48": {"page_size": 48, "head_dim": 80, "v_head_dim": 48},
    "float32": {"kv_dtype": "float32"},
    "e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    "e5m2, HND": {"kv_dtype": "float8_e5m2", "kv_layout": "HND", "page_size": 8},
}


@pytest.mark.parametrize("corner", PAGES)
def test_pages_are_copied(corner: str, device: str, assert_right: Callable[[Any], None]) -> None:  # requirement D15
    request = KvPagesCopyRequest(**{"num_kv_heads": 2, "head_dim": 64, **PAGES[corner]})
    implementation = kv_pages_copy(request, device)
    for seed in (0, 1):
        for interleaved in (False, True) if request.head_dim == request.v_head_dim else (False,):
            assert_right(
                make_copy_case(request, device=device, seed=seed, interleaved=interleaved).check(implementation)
            )


def test_copies_are_of_pairs(device: str) -> None:
    cache = torch.zeros(2, 1, 1, 4, device=device)
    call = kv_pages_copy(KvPagesCopyRequest(num_kv_heads=1, head_dim=4, page_size=1, kv_dtype="float32"), device)
    with pytest.raises(ValueError, match=r"source is torch.int32 \(1,\), target torch.int32 \(2,\): they are pairs"):
        call(cache, cache, torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    none = torch.zeros(0, dtype=torch.int32, device=device)
    call(cache, cache, none, none)


@pytest.mark.parametrize("form", ["plain", "strided", "out"])
@pytest.mark.parametrize("corner", PAGES)
def test_rows_are_gathered(corner: str, form: str, device: str, assert_right: Callable[[Any], None]) -> None:
    # requirement D15, E12
    fields = {"num_kv_heads": 3, "head_dim": 40, **PAGES[corner]}
    scales = ("tensor", "head") if str(fields.get("kv_dtype")).startswith("float8") else ("tensor",)
    for dtype in (None, "float16"):
        for kv_scale in scales:
            request = KvPagesGatherRequest(**fields, dtype=dtype, kv_scale=kv_scale)
            assert_right(make_gather_case(request, device=device, form=form).check(kv_pages_gather(request, device)))


def test_nothing_is_gathered_from_empty_rows(device: str) -> None:
    cache = torch.zeros(1, 16, 2, 8, device=device)
    none = torch.zeros(3, dtype=torch.int32, device=device)
    request = KvPagesGatherRequest(num_kv_heads=2, head_dim=8, kv_dtype="float32")
    k, v = kv_pages_gather(request, device)(cache, cache, torch.zeros(2, 1).int().to(device), none, 0, 0)
    assert k.shape == v.shape == (0, 2, 8)
    with pytest.raises(ValueError, match="does not do float64 into float64"):
        kv_pages_gather(request.replace(kv_dtype="float64", dtype="float64"), device)


@pytest.mark.gpu
def test_captured_calls_follow_their_arguments(device: str) -> None:  # requirement P37
    """Each op once in one graph, replayed with other slots, positions, pages and lengths in the same tensors."""
    fields: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64, "kv_dtype": "float16", "page_size": 8}
    turn = rotary_kv_cache_write(RotaryKvCacheWriteRequest(**fields, num_q_heads=4, dtype="float16"), device)
    put = write(KvCacheWriteRequest(**fields, dtype="float16"), device)
    copy = kv_pages_copy(KvPagesCopyRequest(**fields), device)
    gather = kv_pages_gather(KvPagesGatherRequest(**fields), device)
    q, k, v = (torch.randn(6, heads, 64, device=device).half() for heads in (4, 2, 2))
    angles = torch.arange(32 * 16, device=device).view(16, 32) / 99
    numbers = {
        "positions": torch.arange(6),
        "slots": torch.arange(6),
        "others": torch.arange(20, 26),
        "source": torch.tensor([0]),
        "target": torch.tensor([4]),
        "table": torch.tensor([[0, 2], [4, 1]]).int(),
        "lengths": torch.tensor([0, 9, 14]).int(),
    }
    held = {name: x.to(device) for name, x in numbers.items()}

    def call(caches: list[torch.Tensor]) -> list[torch.Tensor]:
        turned = turn(q, k, v, angles.cos(), angles.sin(), held["positions"], *caches, held["slots"])
        put(k, v, *caches, held["others"])
        copy(*caches, held["source"], held["target"])
        return [turned, *gather(*caches, held["table"], held["lengths"], 14, 9), *caches]

    caches = [torch.randn(6, 8, 2, 64, device=device).half() for _ in "kv"]
    call(caches)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(caches)
    held["positions"].copy_(torch.tensor([9, 3, 15, 0, 1, 2]))
    held["slots"].copy_(torch.tensor([40, -1, 7, 3, 12, 1]))
    held["others"].copy_(torch.tensor([-1, 17, 19, 23, 47, 30]))
    held["source"].copy_(torch.tensor([5]))
    held["target"].copy_(torch.tensor([3]))
    held["table"].copy_(torch.tensor([[3, 5], [2, -7]]))
    held["lengths"].copy_(torch.tensor([0, 9, 12]))
    before = [cache.clone() for cache in caches]
    graph.replay()
    torch.cuda.synchronize()
    for found, right in zip(out, call(before), strict=True):
        tokens = 12 if found.shape[0] == 14 else len(found)
        assert torch.equal(found[:tokens], right[:tokens])
