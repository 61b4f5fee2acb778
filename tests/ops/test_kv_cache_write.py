"""The cache write: slots, formats, scales, layouts; and what is written is what attention reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hal_ops import FP8_DTYPES, torch_dtype
from hal_ops.attention import AttentionRequest, reference, torch_sdpa
from hal_ops.attention.cases import make_case as attention_case
from hal_ops.attention.paged_inputs import block_tables, make_step
from hal_ops.kv_cache import KvCacheWriteRequest, torch_write
from hal_ops.kv_cache import reference as write_reference
from hal_ops.kv_cache.cases import make_case
from hal_ops.kv_layout import page_shapes

RequestOf = Callable[..., AttentionRequest]
FORMATS = ("float32", "bfloat16", "float16", *FP8_DTYPES)


def write_request(**fields: Any) -> KvCacheWriteRequest:
    return KvCacheWriteRequest(**{"num_kv_heads": 3, "head_dim": 16, "page_size": 4, **fields})


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN"])
def test_against_the_reference(assert_right: Any, kv_dtype: str, layout: str) -> None:
    # requirement B6, P30, D8
    fp8 = kv_dtype in FP8_DTYPES
    for graph in (False, True):
        for fields in (
            {},
            {"dtype": "float32"},
            {"v_head_dim": 8},
            {"page_size": 1},
            {"kv_scale": "head"} if fp8 else {},
        ):
            request = write_request(kv_dtype=kv_dtype, kv_layout=layout, graph=graph, **fields)
            for interleaved in (False, True) if request.v_head_dim == 16 else (False,):
                assert_right(make_case(request, interleaved=interleaved).check(torch_write.write(request, "cpu")))


@pytest.mark.parametrize("graph", [False, True])
def test_slots_of_no_token(assert_right: Any, graph: bool) -> None:
    request = write_request(graph=graph)
    call = torch_write.write(request, "cpu")
    k = torch.ones(3, 3, 16, dtype=torch.bfloat16)
    for slots in (torch.full((3,), -1), torch.tensor([-7, -1, -(2**40)])):
        caches = torch.zeros(2, 2, 4, 3, 16, dtype=torch.bfloat16)
        call(k, k, caches[0], caches[1], slots)
        assert (caches == 0).all()
    caches = torch.zeros(2, 2, 4, 3, 16, dtype=torch.bfloat16)
    call(k[:0], k[:0], caches[0], caches[1], torch.zeros(0, dtype=torch.int64))
    assert (caches == 0).all()
    call(k, k, caches[0], caches[1], torch.tensor([-1, 5, -1]))
    assert caches.sum() == 2 * 48
    assert (caches[:, 1, 1] == 1).all()


@pytest.mark.parametrize("module", [torch_write, write_reference])
@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
def test_fp8_saturates(module: Any, kv_dtype: str) -> None:
    """Too large values become the largest, infinities too; NaN stays; nothing else becomes NaN."""
    most = torch.finfo(torch_dtype(kv_dtype)).max
    given = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan, most, -most, most * 1.5])
    wanted = [most, -most, most, -most, torch.nan, most, -most, most]
    request = write_request(num_kv_heads=1, head_dim=8, dtype="float32", kv_dtype=kv_dtype)
    cache = torch.zeros(1, 4, 1, 8).to(torch_dtype(kv_dtype))
    other = cache.view(torch.uint8).clone().view(cache.dtype)
    x = given.view(1, 1, 8)
    module.write(request, "cpu")(x, x, cache, other, torch.tensor([2]))
    for written in (cache, other):
        torch.testing.assert_close(written[0, 2, 0].float(), torch.tensor(wanted), equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
def test_write_and_read_are_inverse(request_of: RequestOf, kv_dtype: str) -> None:
    """With scales of 0.5 and 2: one key a row, so that out is v as the cache gave it back."""
    # requirement B6, D12, P30
    for scales in (torch.tensor([0.5]), torch.tensor([0.5, 2.0])):
        kv_scale = "head" if len(scales) > 1 else "tensor"
        request = request_of(dtype="bfloat16", kv_dtype=kv_dtype, kv_scale=kv_scale)
        write = write_request(
            num_kv_heads=2, head_dim=32, page_size=16, dtype="bfloat16", kv_dtype=kv_dtype, kv_scale=kv_scale
        )
        k, v = torch.randn(2, 3, 2, 32).bfloat16()
        caches = [torch.zeros(3, 16, 2, 32).to(torch_dtype(kv_dtype)) for _ in range(2)]
        step = make_step([1] * 3, [1] * 3, torch.tensor([[2], [0], [1]]), 16)
        torch_write.write(write, "cpu")(k, v, *caches, step.slot_mapping, k_scale=scales, v_scale=1 / scales)
        impl = torch_sdpa.decode(request, "cpu")
        q = torch.randn(3, 6, 32).bfloat16()
        out = impl(q, *caches, step, impl.plan(step), k_scale=scales, v_scale=1 / scales)
        step_size = 2**-2 if "e5m2" in kv_dtype else 2**-3
        wanted = v.repeat_interleave(3, 1)
        torch.testing.assert_close(out, wanted, atol=2**-6, rtol=step_size / 2)


@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN"])
@pytest.mark.parametrize("fields", [{}, {"window": 7, "sinks": True}, {"dtype": "bfloat16"}])
def test_chunks_equal_the_whole(request_of: RequestOf, layout: str, fields: dict[str, Any]) -> None:
    # requirement D7, B9
    request = request_of(kv_layout=layout, return_lse=True, **fields)
    whole = attention_case(request, "prefill", lengths=((37, 37), (20, 20)))
    right = whole.call(torch_sdpa.prefill(request, "cpu"))
    sinks = {name: x for name, x in whole.kwargs.items() if name == "sinks"}
    for chunks in ((37,), (16, 21), (5, 17, 1, 14)):
        found = by_chunks(request, whole.args, (37, 20), chunks, sinks)
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[request.dtype]
        for name, value in found.items():
            torch.testing.assert_close(value, right[name], atol=tolerance, rtol=tolerance)


def by_chunks(
    request: AttentionRequest, three: tuple[Tensor, ...], lengths: tuple[int, int], chunks: tuple[int, ...], sinks: Any
) -> dict[str, Tensor]:
    """Two sequences fed to extend a chunk at a time, both at once, through a cache that holds NaN at first."""
    size = int(request.page_size)
    table, pages = block_tables([(n, n) for n in lengths], size, torch.Generator().manual_seed(3))
    shapes = page_shapes(request.kv_layout, size, 2, 32, 32, request.dtype)
    caches = [torch.full((pages, *shape), torch.nan, dtype=torch_dtype(request.dtype)) for shape in shapes]
    impl = torch_sdpa.extend(request, "cpu")
    write = torch_write.write(
        KvCacheWriteRequest(
            num_kv_heads=2, head_dim=32, dtype=request.dtype, page_size=size, kv_layout=request.kv_layout
        ),
        "cpu",
    )
    parts: list[list[dict[str, Tensor]]] = [[], []]
    done = [0, 0]
    for chunk in chunks:
        q_lens = [min(chunk, n - d) for n, d in zip(lengths, done, strict=True)]
        step = make_step(q_lens, [d + n for d, n in zip(done, q_lens, strict=True)], table, size)
        spans = [(b + d, b + d + n) for b, d, n in zip((0, lengths[0]), done, q_lens, strict=True)]
        q, k, v = (torch.cat([x[a:b] for a, b in spans]) for x in three)
        write(k, v, *caches, step.slot_mapping)
        out, lse = impl(q, *caches, step, impl.plan(step), return_lse=True, **sinks)
        for row, (a, b) in enumerate(((0, q_lens[0]), (q_lens[0], sum(q_lens)))):
            parts[row].append({"out": out[a:b], "lse": lse[a:b]})
        done = [d + n for d, n in zip(done, q_lens, strict=True)]
    assert done == list(lengths)
    return {name: torch.cat([part[name] for row in parts for part in row]) for name in ("out", "lse")}


def test_a_warm_prefix_equals_a_cold_start(request_of: RequestOf) -> None:
    # requirement D14, D7
    request = request_of(return_lse=True)
    cold = attention_case(request, "extend", lengths=((33, 33),))
    q, *caches, step = cold.args
    warm = make_step([8], [33], step.block_table, 16)
    for module in (reference, torch_sdpa):
        impl = module.extend(request, "cpu")
        out, lse = impl(q[-8:], *caches, warm, impl.plan(warm), return_lse=True)
        right = cold.call(impl)
        torch.testing.assert_close(out, right["out"][-8:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse, right["lse"][-8:], atol=1e-6, rtol=1e-5)


def test_wrong_writes_are_caught() -> None:
    # requirement X20
    request = write_request(kv_dtype="float8_e4m3fn", kv_scale="head", dtype="float32")
    right = torch_write.write(request, "cpu")
    case = make_case(request)

    def shifted(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, slots: Tensor, **scales: Any) -> None:
        right(k, v, kc, vc, torch.where(slots < 0, slots, (slots + 1) % 28), **scales)

    def unscaled(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, slots: Tensor, **scales: Any) -> None:
        right(k, v, kc, vc, slots, k_scale=scales["k_scale"])

    def unskipped(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, slots: Tensor, **scales: Any) -> None:
        right(k, v, kc, vc, slots % 28, **scales)

    def one_scale(k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, slots: Tensor, **scales: Any) -> None:
        right(k, v, kc, vc, slots, k_scale=scales["k_scale"], v_scale=scales["v_scale"][:1])

    for wrong in (shifted, unscaled, unskipped, one_scale):
        assert not all(c.ok for c in case.check(wrong)), wrong.__name__
    assert all(c.ok for c in case.check(right))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kv_dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"kv_dtype": "fp8_e4m3"}, "unknown dtype 'fp8_e4m3'"),
        ({"page_size": 0}, "page_size=0: give a whole number"),
        ({"kv_layout": "auto"}, "choose 'NHD' or 'HND' or 'HDN'"),
        ({"kv_scale": "head"}, "needs an FP8 cache"),
        ({"graph": 1}, "give True or False"),
    ],
)
def test_requests_that_nothing_could_honour(fields: dict[str, Any], text: str) -> None:
    # requirement P29
    with pytest.raises(ValueError, match=text):
        write_request(**fields)


def test_formats_that_are_not_written() -> None:
    with pytest.raises(ValueError, match="kv_dtype int8: torch_write does float64"):
        torch_write.write(write_request(kv_dtype="int8"), "cpu")
