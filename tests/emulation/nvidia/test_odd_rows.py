"""Rows that begin where a library cannot load them: refused with the next step, before the library is called.

``tests/gpu/test_odd_rows.py`` has the libraries themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from torch import Tensor

import hal
from hal import _plugins
from hal.errors import InputError, RegistrationError
from hal_nvidia import NvidiaPlatform

SIZES: dict[str, Any] = {
    "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "page_size": 16, "kv_layout": "NHD",
}  # fmt: skip


def rows(tokens: int, heads: int, *, begin: int = 0, apart: int = 0, wider: int = 0) -> Tensor:
    """``[tokens, heads, 64]``: a view that begins ``begin`` elements on, with gaps behind each token and each head."""
    token = heads * (64 + wider) + apart
    memory = torch.randn(begin + tokens * token).half()
    return memory[begin:].view(tokens, token)[:, : heads * (64 + wider)].unflatten(1, (heads, -1))[..., :64]


ODD = {
    "q of 3 tokens 2 bytes on": ({"begin": 1}, r"q \(3, 4, 64\) begins 2 bytes past a multiple of 16"),
    "tokens 4 bytes further apart": ({"apart": 2}, r"q \(3, 4, 64\) has rows \[516, 128\] bytes apart"),
    "heads 8 bytes further apart": ({"wider": 4}, r"q \(3, 4, 64\) has rows \[544, 136\] bytes apart"),
}
FINE: tuple[dict[str, int], ...] = ({"begin": 8}, {"apart": 8}, {"wider": 16})


@pytest.fixture
def held() -> Iterator[Any]:
    with nvidia.running("fa3") as installed:
        yield installed
    hal.reset()


def attention(**fields: Any) -> Any:
    return hal.get_attention(**{**SIZES, **fields}, device=hardware.device_of("sm_90"), kernel="fa3")


def steps(odd: Tensor) -> list[Callable[[], Any]]:
    """A ragged call, a dense one, and a step over a cache, each with ``odd`` as q."""
    count = len(odd)
    k, v = rows(count, 2), rows(count, 2)
    cu = torch.tensor([0, count], dtype=torch.int32)
    attn = attention()
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": count, "max_seqlen_k": count}
    plan = attn.plan(q_lens=[count], kv_lens=[count + 4], block_table=[[0, 1]])
    return [
        lambda: attn(odd, k, v, **lengths),
        lambda: attn(odd[None], k[None], v[None]),
        lambda: attn(odd, cache=attn.allocate_kv_cache(2), plan=plan),
    ]


@pytest.mark.parametrize("name", list(ODD))
def test_they_are_refused(name: str, held: Any) -> None:  # requirement B3, C7, P32
    gaps, text = ODD[name]
    for step in steps(rows(3, 4, **gaps)):
        held.calls.clear()
        with pytest.raises(
            InputError, match=text.replace(r"\(3", r"\((1, )?3").replace(r"\[", r"\[(\d+, )?")
        ) as caught:
            step()
        assert "fa3." in str(caught.value)
        assert "loads 16 bytes at once: give q.clone(" in str(caught.value)
        assert not held.calls


@pytest.mark.parametrize("gaps", FINE, ids=str)
def test_others_are_not(gaps: dict[str, int], held: Any) -> None:  # requirement B3
    for step in steps(rows(3, 4, **gaps)):
        step()


def test_nor_are_odd_gaps_that_nothing_lies_behind(held: Any) -> None:
    """Of one token, what is between tokens has no meaning."""
    for step in steps(rows(1, 4, apart=2)):
        step()


def test_where_like_tensors_begin_is_looked_at_again_for_debug_checks(held: Any) -> None:  # requirement B3, R9
    even, odd, kv = rows(3, 4)[None], rows(3, 4, begin=1)[None], rows(3, 2)[None]
    with hal.override(debug_checks=True):
        attn = attention()
        attn(even, kv, kv)
        with pytest.raises(InputError, match="begins 2 bytes past a multiple of 16"):
            attn(odd, kv, kv)
        plan, cache = attn.plan(q_lens=[3], kv_lens=[3], block_table=[[0]]), attn.allocate_kv_cache(1)
        attn(even[0], cache=cache, plan=plan)
        with pytest.raises(InputError, match="begins 2 bytes past a multiple of 16"):
            attn(odd[0], cache=cache, plan=plan)


def test_a_cache_of_odd_pages_is_refused(held: Any) -> None:  # requirement P32
    attn = attention()
    pages = torch.zeros(2 * 16 * 2 * 64 + 1).half()[1:].view(2, 16, 2, 64)
    plan = attn.plan(q_lens=[1], kv_lens=[3], block_table=[[0]])
    with pytest.raises(InputError, match=r"k \(2, 16, 2, 64\) begins 2 bytes past a multiple of 16, and fa3\."):
        attn(rows(1, 4), cache=hal.KVCache(pages, pages, layout="NHD"), plan=plan)


def test_kernels_that_take_any_rows_get_them() -> None:  # requirement B3
    """No call is refused for a kernel that is not the handle's."""
    attn = hal.get_attention(**{**SIZES, "dtype": "float32"}, device="cpu")
    q, k, v = (rows(3, h, begin=1, apart=2).float()[None] for h in (4, 2, 2))
    assert attn(q, k, v).isfinite().all()
    loose = {k.library for k in NvidiaPlatform().kernels() if k.op == "attention" and k.row_alignment == 1}
    assert loose == {"fa4"}, "it copies what does not suit it"


def test_a_declaration_without_a_size_is_an_error() -> None:
    for size in (0, 12):
        wrong = dataclasses.replace(hardware.kernel_named("fa3.prefill"), row_alignment=size)
        with pytest.raises(RegistrationError, match=f"row_alignment {size} is no power of two"):
            wrong.validate(_plugins.registry().ops["attention"])
