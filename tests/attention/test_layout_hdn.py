"""The layout whose keys lie in vectors of 16 bytes: never guessed, never chosen unasked, the same attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal.errors import InputError
from hal_ops.attention import AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest

SMALL: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4, "dtype": "float32"}
WIDTHS = {"float32": 4, "bfloat16": 8, "float16": 8, "float8_e4m3fn": 16}


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kv_dtype", WIDTHS)
def test_a_cache_has_the_vectors_of_its_format(kv_dtype: str) -> None:
    # requirement D8
    dtype = "bfloat16" if "float8" in kv_dtype else kv_dtype
    handle = hal.get_attention(
        **{**SMALL, "dtype": dtype}, v_head_dim=8, kv_dtype=kv_dtype, kv_layout="HDN", device="cpu"
    )
    cache = handle.allocate_kv_cache(3)
    x = WIDTHS[kv_dtype]
    assert (cache.k.shape, cache.v.shape) == ((3, 2, 16 // x, 4, x), (3, 2, 8, 4))
    assert x * cache.k.itemsize == 16
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.dims) == (3, 4, 2, (16, 8))
    assert "dims 16/8" in repr(cache)


def test_a_token_lies_where_the_address_says() -> None:
    # requirement D8, D14
    handle = hal.get_attention(**SMALL, kv_layout="HDN", device="cpu")
    cache = handle.allocate_kv_cache(3)
    plan = handle.plan(q_lens=[1], kv_lens=[7], block_table=[[0, 2]])
    k, v = rows(1, 2, 16), rows(1, 2, 16) + 1
    handle(rows(1, 4, 16), k, v, cache=cache, plan=plan)
    for head in range(2):
        for d in range(16):
            at = 2 * 2 * 16 * 4 + head * 16 * 4
            assert cache.k.flatten()[at + d // 4 * 4 * 4 + 2 * 4 + d % 4] == k[0, head, d]
            assert cache.v.flatten()[at + d * 4 + 2] == v[0, head, d]
    assert int(cache.k.ne(0).sum()) == int(cache.v.ne(0).sum()) == 32


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_prompts_chunks_and_single_tokens_are_as_in_any_other_layout(kernel: str | None, kv_dtype: str) -> None:
    # requirement D7, D8, B9
    dtype = {"dtype": "float32" if kv_dtype == "float32" else "bfloat16", "kv_dtype": kv_dtype}
    found: dict[str, list[Tensor]] = {}
    for layout in ("NHD", "HDN"):
        handle = hal.get_attention(**{**SMALL, **dtype}, kv_layout=layout, window=6, device="cpu", kernel=kernel)
        cache, outs = handle.allocate_kv_cache(8), []
        done = [0, 0]
        for lens in ([5, 2], [3, 6], [1, 1], [1, 1]):
            done = [d + n for d, n in zip(done, lens, strict=True)]
            plan = handle.plan(q_lens=lens, kv_lens=done, block_table=[[1, 4, 0], [7, 3, 2]])
            q, k, v = (rows(sum(lens), heads, 16).to(handle._dtype) for heads in (4, 2, 2))
            outs.append(handle(q, k, v, cache=cache, plan=plan))
        found[layout] = outs
    for ours, right in zip(found["HDN"], found["NHD"], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


def test_two_halves_of_one_tensor() -> None:
    # requirement D8
    handle = hal.get_attention(**SMALL, kv_layout="HDN", device="cpu")
    both = torch.zeros(3, 2, 2 * 16 * 4)
    cache = hal.KVCache(both[:, 0].view(3, 2, 4, 4, 4), both[:, 1].view(3, 2, 16, 4), layout="HDN")
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[1]])
    handle(rows(1, 4, 16), rows(1, 2, 16), rows(1, 2, 16), cache=cache, plan=plan)
    assert int(both[1].ne(0).sum()) == 64


def test_auto_never_stands_for_it() -> None:
    # requirement C2, P29
    request = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64)
    for device in ("cpu:x86_64", "nvidia:sm_90,cuda=12.8", "rocm:gfx942,hip=6.4", "rocm:gfx950,hip=7.0"):
        with hal.simulate(device, libraries={"torch": "2.9.1", "triton": "3.4.0", "amd-aiter": "0.1.20.post1"}):
            for phases in (None, "decode"):
                found = hal.select(request.replace(phases=phases, max_q_len=4, page_size=16))
                assert found.request.kv_layout in ("NHD", "HND")  # type: ignore[attr-defined]


def test_layers_of_one_pool_share_it_or_clash() -> None:
    # requirement D10
    layers = [{**SMALL, "kv_layout": layout} for layout in ("HDN", "HDN", "NHD")]
    made = hal.get_attentions(layers[:2], device="cpu")
    assert {handle.request.kv_layout for handle in made} == {"HDN"}
    with pytest.raises(InputError, match="different kv_layout: 'HDN' by layers 0, 1; 'NHD' by layers 2"):
        hal.get_attentions(layers, device="cpu")


def test_kernels_of_other_layouts_refuse_it_with_a_reason() -> None:
    # requirement E6, P29
    libraries = {"torch": "2.9.1", "triton": "3.4.0", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}
    with hal.simulate("nvidia:sm_90,cuda=12.8", libraries=libraries):
        selection = hal.select(AttentionRequest(**{**SMALL, "dtype": "bfloat16"}, kv_layout="HDN"))
    refused = {
        c.kernel.name: [r.text for r in c.reasons if r.code == "layout"]
        for c in selection.choices["decode"].candidates
        if c.kernel.library in ("fa2", "fa3")
    }
    assert refused
    assert all(any("HDN" in text for text in texts) for texts in refused.values())


@pytest.mark.parametrize(
    ("k", "v", "text"),
    [
        ((3, 4, 2, 16), (3, 4, 2, 16), r"must be \[num_pages, num_kv_heads, dim / 4, page_size, 4\]"),
        ((3, 2, 2, 4, 8), (3, 2, 16, 4), "vectors of 16 bytes, 4 elements"),
        ((3, 2, 4, 4, 4), (3, 2, 4, 16), "page_size, 4"),
        ((3, 2, 4, 4, 4), (3, 1, 16, 4), "page_size, 4"),
    ],
)
def test_wrapping_what_has_no_such_shape(k: tuple[int, ...], v: tuple[int, ...], text: str) -> None:
    # requirement P32
    with pytest.raises(InputError, match=text):
        hal.KVCache(torch.zeros(k), torch.zeros(v), layout="HDN")


def test_wrapping_what_has_gaps_within_a_page() -> None:
    # requirement D8, P32
    handle = hal.get_attention(**SMALL, kv_layout="HDN", device="cpu")
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    good = handle.allocate_kv_cache(3)
    turned = torch.zeros(3, 2, 4, 16).transpose(2, 3)
    vectors = torch.zeros(3, 2, 4, 4, 4).transpose(2, 3)
    for k, v in ((good.k, turned), (vectors, good.v)):
        with pytest.raises(InputError, match="leave gaps within a head's part of a page"):
            handle(rows(1, 4, 16), cache=hal.KVCache(k, v, layout="HDN"), plan=plan)
    flat = hal.KVCache(torch.zeros(3, 4, 2, 16), torch.zeros(3, 4, 2, 16), layout="NHD")
    with pytest.raises(InputError, match="layout is NHD, not HDN"):
        handle(rows(1, 4, 16), cache=flat, plan=plan)


def test_heads_that_are_no_whole_vectors() -> None:
    # requirement P29
    for fields in (
        {"head_dim": 12},
        {"head_dim": 24, "kv_dtype": "float8_e4m3fn"},
        {"head_dim": 24, "kv_dtype": "fp8"},
    ):
        with pytest.raises(ValueError, match="keys in vectors of 16 bytes"):
            AttentionRequest(**{**SMALL, "dtype": "bfloat16", **fields}, kv_layout="HDN")
    with pytest.raises(ValueError, match="head_dim=6 is no multiple of the 8"):
        KvCacheWriteRequest(num_kv_heads=1, head_dim=6, kv_layout="HDN")
    assert AttentionRequest(**SMALL, v_head_dim=3, kv_layout="HDN").v_head_dim == 3
