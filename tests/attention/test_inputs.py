"""Bad input gives one clear error before anything is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small_requests import SMALL

import hal
from hal.errors import InputError, PlanMismatchError


def q(*lead: int, heads: int = 4, dim: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*lead, heads, dim, dtype=dtype)


def k(*lead: int, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*lead, heads, dim, dtype=dtype)


def cu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((q(1, 3), None, k(1, 3)), "k and v are missing"),
        ((q(3), k(3), k(3)), "need cu_seqlens or a plan"),
        ((q(1, 3, heads=2), k(1, 3), k(1, 3)), r"q is \(1, 3, 2, 8\): its last dims must be \(4, 8\)"),
        ((q(1, 3), k(1, 3, heads=4), k(1, 3)), r"k is .* must be \(2, 8\)"),
        ((q(1, 3), k(1, 3), k(1, 3, dim=16)), r"v is .* must be \(2, 8\)"),
        ((q(1, 3, dtype=torch.bfloat16), k(1, 3), k(1, 3)), "q is torch.bfloat16, and the request is float32"),
        ((q(1, 3), k(1, 3, dtype=torch.float16), k(1, 3)), "k is torch.float16"),
        ((q(1, 3), k(1, 3).to("meta"), k(1, 3)), "k is on meta, and the handle on cpu"),
        ((q(2, 3), k(1, 3), k(1, 3)), "batches 2, 1, 1"),
        ((q(1, 3), k(1, 5), k(1, 4)), "k has 5 keys, v 4"),
        ((q(1, 3), k(1, 3), torch.zeros(1, 3, 8, 2).transpose(2, 3)), "v's last stride is 2"),
    ],
)
def test_dense(arguments: tuple[Any, ...], text: str) -> None:  # requirement P32
    handle = hal.get_attention(**SMALL)
    handle(q(1, 3), k(1, 3), k(1, 3))
    with pytest.raises(InputError, match=text):
        handle(*arguments)


def test_a_wrong_device_is_seen_on_the_fast_path_too() -> None:
    handle = hal.get_attention(**SMALL)
    good = (q(1, 3), k(1, 3), k(1, 3))
    handle(*good)
    handle(*good)
    with pytest.raises(InputError, match="q is on meta"):
        handle(good[0].to("meta"), *good[1:])


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"cu_seqlens_q": cu(0, 3)}, "cu_seqlens_k is missing"),
        ({"cu_seqlens_q": cu(0, 3, dtype=torch.int64), "cu_seqlens_k": cu(0, 3)}, "give int32"),
        ({"cu_seqlens_q": cu(0, 2, 3), "cu_seqlens_k": cu(0, 3)}, "cu_seqlens_q has 2 sequences, cu_seqlens_k 1"),
        ({"cu_seqlens_q": cu(1, 3), "cu_seqlens_k": cu(0, 3)}, "must start at 0"),
        ({"cu_seqlens_q": cu(0, 2, 1, 3), "cu_seqlens_k": cu(0, 1, 2, 3)}, "never fall"),
        ({"cu_seqlens_q": cu(0, 4), "cu_seqlens_k": cu(0, 3)}, "cu_seqlens_q ends at 4, and there are 3 tokens"),
        ({"cu_seqlens_q": cu(0, 3), "cu_seqlens_k": cu(0, 3), "max_seqlen_k": 2}, "max_seqlen_k=2, and .* of 3"),
        (
            {"cu_seqlens_q": cu(0, 9, 3)[::2], "cu_seqlens_k": cu(0, 3)},
            r"cu_seqlens_q has strides \(2,\): give a contig",
        ),
        ({"cu_seqlens_q": cu(0, 3), "cu_seqlens_k": cu(0, 9, 3)[::2]}, r"cu_seqlens_k has strides \(2,\)"),
        ({"cu_seqlens_q": cu(0, 3).to("meta"), "cu_seqlens_k": cu(0, 3)}, "cu_seqlens_q is on meta"),
    ],
)
def test_ragged(keywords: dict[str, Any], text: str) -> None:  # requirement D9
    with pytest.raises(InputError, match=text):
        hal.get_attention(**SMALL)(q(3), k(3), k(3), **keywords)


@pytest.mark.parametrize(
    ("request_", "call", "text"),
    [
        ({}, {"sinks": torch.zeros(4)}, "sinks is given: ask for it with sinks=True"),
        ({"sinks": True}, {}, "sinks is missing: the request says sinks=True"),
        ({"alibi": True}, {}, "alibi_slopes is missing"),
        ({"sinks": True}, {"sinks": torch.zeros(2)}, r"sinks is \(2,\): give one number a query head, \[4\]"),
        ({"sinks": True}, {"sinks": torch.zeros(4, dtype=torch.bfloat16)}, "sinks is torch.bfloat16: give float32"),
        ({"sinks": True}, {"sinks": torch.zeros(8)[::2]}, r"sinks has strides \(2,\): give a contiguous one"),
        ({"alibi": True}, {"alibi_slopes": torch.zeros(1).expand(4)}, r"alibi_slopes has strides \(0,\)"),
        ({}, {"return_lse": True}, "was not in the request"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    request_: dict[str, Any], call: dict[str, Any], text: str
) -> None:  # requirement C7, P23, P24
    with pytest.raises(InputError, match=text):
        hal.get_attention(**SMALL, **request_)(q(1, 3), k(1, 3), k(1, 3), **call)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"q_lens": [1, 2], "kv_lens": [3], "block_table": [[0]]}, "q_lens has 2 rows, kv_lens 1"),
        ({"q_lens": [4], "kv_lens": [3], "block_table": [[0]]}, "row 0: q_len 4 is more than kv_len 3"),
        ({"q_lens": [-1], "kv_lens": [3], "block_table": [[0]]}, r"q_lens\[0\]=-1"),
        ({"q_lens": [1.5], "kv_lens": [3], "block_table": [[0]]}, r"q_lens\[0\]=1.5"),
        ({"q_lens": torch.ones(1), "kv_lens": [3], "block_table": [[0]]}, "q_lens holds torch.float32"),
        ({"q_lens": 1, "kv_lens": [3], "block_table": [[0]]}, "give a sequence or a tensor"),
        (
            {"q_lens": [1], "kv_lens": [9], "block_table": [[0, 1]]},
            r"2 pages a row, and the longest kv_len \(9\) takes 3",
        ),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[0], [1]]}, r"block_table is \(2, 1\)"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": torch.zeros(1, 1)}, "block_table holds torch.float32"),
    ],
)
def test_plans(step: dict[str, Any], text: str) -> None:  # requirement D9
    with pytest.raises(InputError, match=text):
        hal.get_attention(**SMALL).plan(**step)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: (torch.zeros(3, 8, 2, 8), torch.zeros(3, 8, 2, 8), "NHD"), "page_size is 8, not 4"),
        (lambda: (torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), "HND"), "layout is HND, not NHD"),
        (
            lambda: (torch.zeros(3, 2, 4, 8).transpose(1, 2), torch.zeros(3, 2, 4, 8).transpose(1, 2), "NHD"),
            "are those of HND",
        ),
        (
            lambda: (torch.zeros(3, 4, 2, 8).half(), torch.zeros(3, 4, 2, 8).half(), "NHD"),
            "dtype is float16, not float32",
        ),
        (lambda: (torch.zeros(3, 4, 2, 16), torch.zeros(3, 4, 2, 16), "NHD"), "k has dim 16, not 8"),
        (lambda: (torch.zeros(3, 4, 2, 16)[..., ::2], torch.zeros(3, 4, 2, 8), "NHD"), "k's last stride is 2"),
    ],
)
def test_caches(build: Any, text: str) -> None:  # requirement D8, P32
    handle = hal.get_attention(**SMALL, kv_layout="NHD")
    k_pages, v_pages, layout = build()
    cache = hal.KVCache(k_pages, v_pages, layout=layout)
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    with pytest.raises(InputError, match=text):
        handle(q(1), k(1), k(1), cache=cache, plan=plan)
    assert not cache.k.any()


def test_tokens_of_a_page_that_lie_too_far_apart() -> None:  # requirement D8
    """Kernels add them up in 32 bits."""
    text = "lie 1073741824 elements apart: the 4 of a page must lie within 2\\*\\*31 elements"
    handle = hal.get_attention(**SMALL, kv_layout="NHD")
    far = torch.empty_strided((3, 4, 2, 8), (16, 1 << 30, 8, 1), device="meta")
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    with pytest.raises(InputError, match=f"v's tokens {text}"):
        handle(q(1), cache=hal.KVCache(torch.empty(3, 4, 2, 8, device="meta"), far, layout="NHD"), plan=plan)
    latent = hal.get_mla_attention(num_q_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, dtype="float32", page_size=4)
    cache = hal.MlaCache(torch.empty_strided((3, 4, 24), (24, 1 << 30, 1), device="meta"))
    with pytest.raises(InputError, match=f"data's tokens {text}"):
        latent(torch.zeros(1, 2, 24), cache=cache, plan=latent.plan(q_lens=[1], kv_lens=[1], block_table=[[0]]))


def test_interleaved_k_and_v_views_are_fine() -> None:  # requirement D8
    handle = hal.get_attention(**SMALL, kv_layout="NHD")
    pages = torch.zeros(3, 2, 4, 2, 8)
    cache = hal.KVCache(pages[:, 0], pages[:, 1], layout="NHD")
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[2]])
    handle(q(1), k(1) + 1, k(1) + 2, cache=cache, plan=plan)
    assert pages[2, 0, 0].eq(1).all()
    assert pages[2, 1, 0].eq(2).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layout": "NDH"}, "choose 'NHD', 'HND' or 'HDN'"),
        ({"layout": "NHD", "k_scale": 2.0}, "only FP8 caches are scaled"),
        ({"layout": "NHD", "v": torch.zeros(3, 4, 2, 8).half()}, "a cache has one dtype"),
        ({"layout": "NHD", "v": torch.zeros(4, 4, 2, 8)}, "differ in the last one at most"),
    ],
)
def test_wrapping_a_cache(arguments: dict[str, Any], text: str) -> None:
    tensors = {"k": torch.zeros(3, 4, 2, 8), "v": torch.zeros(3, 4, 2, 8)}
    with pytest.raises(InputError, match=text):
        hal.KVCache(**{**tensors, **arguments})


def test_fp8_scales_must_match_the_request() -> None:  # requirement P29, P30
    per_head = hal.get_attention(**{**SMALL, "dtype": "bfloat16"}, kv_dtype="fp8", kv_scale="head")
    with pytest.raises(InputError, match="k_scale has 1 values, and the request says kv_scale='head'"):
        per_head.allocate_kv_cache(2, k_scale=2.0)
    with pytest.raises(InputError, match="v_scale has 3 values: give one, or one a kv head"):
        per_head.allocate_kv_cache(2, v_scale=[1.0, 2.0, 3.0])
    wrong = hal.get_attention(**{**SMALL, "dtype": "bfloat16"}, kv_dtype="float8_e5m2")
    plan = wrong.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    with pytest.raises(InputError, match="dtype is float8_e4m3fn, not float8_e5m2"):
        wrong(q(1).bfloat16(), cache=per_head.allocate_kv_cache(2), plan=plan)


def test_steps() -> None:  # requirement P35
    handle, other = hal.get_attention(**SMALL), hal.get_attention(**SMALL, window=2)
    cache = handle.allocate_kv_cache(2)
    plan = handle.plan(q_lens=[2], kv_lens=[2], block_table=[[0]])
    for call, error, text in (
        ({"cache": cache}, InputError, "plan is missing"),
        ({"plan": plan}, InputError, "cache is missing"),
        ({"plan": plan, "cache": cache, "cu_seqlens_q": cu(0, 2)}, InputError, "the plan holds the step's lengths"),
        (
            {"plan": other.plan(q_lens=[2], kv_lens=[2], block_table=[[0]]), "cache": cache},
            PlanMismatchError,
            "was made by",
        ),
    ):
        with pytest.raises(error, match=text):
            handle(q(2), k(2), k(2), **call)
    with pytest.raises(InputError, match="q has 3 tokens, the plan 2"):
        handle(q(3), k(2), k(2), cache=cache, plan=plan)
    with pytest.raises(InputError, match="v is missing: give both"):
        handle(q(2), k(2), cache=cache, plan=plan)
    assert not cache.k.any()


SCALES = (
    0,
    0.0,
    -1.0,
    float("nan"),
    float("inf"),
    1e300,
    1e-50,
    torch.zeros(1),
    torch.tensor(float("nan")),
    [1.0, -2.0],
)


@pytest.mark.parametrize("value", [*SCALES, "x", 10**400, ["x"]], ids=lambda x: repr(x)[:16])
def test_scales_that_nothing_can_be_divided_by(value: Any) -> None:  # requirement B6
    handle = hal.get_attention(**{**SMALL, "dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "kv_scale": "head"})
    pages = handle.allocate_kv_cache(1, v_scale=[0.5, 2])
    latent = hal.get_mla_attention(
        num_q_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, kv_dtype="float8_e4m3fn", device="cpu"
    )
    text = "give finite numbers above 0" if any(value is x for x in SCALES) else "give a number, or a tensor of them"
    for make in (
        lambda: handle.allocate_kv_cache(1, k_scale=value),
        lambda: hal.KVCache(pages.k, pages.v, layout=pages.layout, v_scale=value),
        lambda: latent.allocate_kv_cache(1, kv_scale=value),
    ):
        with pytest.raises(InputError, match=f"_scale=.*{text}"):
            make()


def test_caches_of_no_tensors() -> None:
    pages = torch.zeros(2, 4, 2, 8)
    for k, v, text in (([1], [2], "k is a list"), (pages, None, "v is None"), (pages, pages.numpy(), "v is a numpy")):
        with pytest.raises(InputError, match=f"{text}.*: give a tensor"):
            hal.KVCache(k, v, layout="NHD")
    with pytest.raises(InputError, match="data is a list: give a tensor"):
        hal.MlaCache([1])


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("shape", [(), (1, 2), (0,)])
def test_cumulative_lengths_of_other_shapes(name: str, shape: tuple[int, ...]) -> None:  # requirement D3
    handle = hal.get_attention(**SMALL)
    given = {"cu_seqlens_q": cu(0, 3), "cu_seqlens_k": cu(0, 3), name: torch.zeros(shape, dtype=torch.int32)}
    with pytest.raises(InputError, match=rf"{name} is torch.int32 {re.escape(str(shape))}: give int32 \[batch \+ 1\]"):
        handle(q(3), k(3), k(3), **given)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("value", ["3", 3.0, True, -1])
def test_maxima_that_are_no_lengths(name: str, value: Any) -> None:  # requirement D3
    handle = hal.get_attention(**SMALL)
    with pytest.raises(InputError, match=f"{name}={value!r}: give .*at least 0"):
        handle(q(3), k(3), k(3), cu_seqlens_q=cu(0, 3), cu_seqlens_k=cu(0, 3), **{name: value})


def test_pages_out_of_range_are_found_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_DEBUG_CHECKS", "1")
    handle = hal.get_attention(**SMALL, window=3)
    cache = handle.allocate_kv_cache(2)
    for table in ([[0, 2]], [[77, 0]]):
        plan = handle.plan(q_lens=[1], kv_lens=[5], block_table=torch.tensor(table))
        with pytest.raises(InputError, match=r"block_table\[0\]\[\d\] is page \d+, and the cache has 2"):
            handle(q(1), k(1) + 1, k(1) + 1, cache=cache, plan=plan)
    assert not cache.k.any()
    fine = handle.plan(q_lens=[1], kv_lens=[3], block_table=[[1, 77]])
    handle(q(1), k(1), k(1), cache=cache, plan=fine)


def test_a_handle_without_a_phase_says_so() -> None:
    encoder = hal.get_attention(**SMALL, phases=("prefill",))
    with pytest.raises(InputError, match="has no cache: ask for more phases"):
        encoder.allocate_kv_cache(2)
    decoder = hal.get_attention(**SMALL, phases=("decode",))
    with pytest.raises(InputError, match="ask for phases="):
        decoder(q(1, 1), k(1, 1), k(1, 1))
    with pytest.raises(InputError, match="Ask for the extend phase, or for a larger max_q_len"):
        decoder.plan(q_lens=[2], kv_lens=[3], block_table=[[0]])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_that_would_be_lost_is_an_error(which: int) -> None:  # requirement R12
    """On every platform alike, whether or not the kernel there has a backward."""
    handle = hal.get_attention(**SMALL)
    plain = [q(1, 3), k(1, 3), k(1, 3)]
    handle(*plain)
    learnt = [x.requires_grad_() if i == which else x for i, x in enumerate(q_k_v())]
    with pytest.raises(InputError, match=rf"{'qkv'[which]} requires a gradient.*ask for needs_grad=True"):
        handle(*learnt)
    with torch.no_grad():
        handle(*learnt)
    with pytest.raises(InputError, match="requires a gradient"):
        handle(*learnt)
    cache = handle.allocate_kv_cache(1)
    plan = handle.plan(q_lens=[3], kv_lens=[3], block_table=[[0]])
    with pytest.raises(InputError, match="requires a gradient"):
        handle(*(x[0] for x in learnt), cache=cache, plan=plan)


def q_k_v() -> tuple[torch.Tensor, ...]:
    return q(1, 3), k(1, 3), k(1, 3)


def test_maxima_without_lengths_are_refused() -> None:
    handle = hal.get_attention(**SMALL)
    for maxima in ({"max_seqlen_q": 3}, {"max_seqlen_k": 3}):
        with pytest.raises(InputError, match="are for ragged calls"):
            handle(*q_k_v(), **maxima)


def test_scales_of_fp8_values_that_lie_apart() -> None:
    handle = hal.get_attention(
        **{**SMALL, "dtype": "bfloat16"}, qkv_dtype="float8_e4m3fn", qkv_scale="head", phases="prefill"
    )
    given = [x.to(torch.float8_e4m3fn) for x in q_k_v()]
    handle(*given, k_scale=torch.ones(2), v_scale=torch.ones(()))
    with pytest.raises(InputError, match=r"k_scale has strides \(2,\): give a contiguous one"):
        handle(*given, k_scale=torch.ones(4)[::2])
