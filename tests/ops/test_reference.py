"""The reference against the formula written out element by element, over every field of the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hal_ops import FP8_DTYPES
from hal_ops.attention import AttentionRequest, reference
from hal_ops.attention.cases import AttentionCase, make_case
from hal_ops.attention.contract import Step
from hal_ops.kv_layout import vector_of

Naive = Callable[..., tuple[Tensor, Tensor]]

sides = st.one_of(st.none(), st.integers(0, 6))
dims = st.sampled_from([1, 3, 8])


@st.composite
def requests(draw: st.DrawFn) -> AttentionRequest:
    kv_heads = draw(st.integers(1, 2))
    causal = draw(st.booleans())
    kv_dtype = draw(st.sampled_from(["float64", "float32", *FP8_DTYPES]))
    fp8 = kv_dtype in FP8_DTYPES
    layout = draw(st.sampled_from(["NHD", "HND", "HDN"]))
    return AttentionRequest(
        num_q_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        num_kv_heads=kv_heads,
        head_dim=draw(dims) * (vector_of(kv_dtype) if layout == "HDN" else 1),
        v_head_dim=draw(dims),
        dtype="float64",
        kv_dtype=kv_dtype,
        causal=causal,
        window=(draw(sides), draw(sides)),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, 0.3])),
        page_size=draw(st.sampled_from([1, 3, 8])),
        kv_layout=layout,
        kv_scale=draw(st.sampled_from(["tensor", "head"])) if fp8 else "tensor",
        return_lse=True,
    )


rows = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12)), min_size=1, max_size=4)


def naive_of(case: AttentionCase, naive: Naive, sequences: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    extras = case.kwargs.get("sinks"), case.kwargs.get("alibi_slopes")
    pairs = [naive(*three, case.request, *extras) for three in sequences]
    return torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs])


def read_rows(case: AttentionCase) -> list[tuple[Tensor, ...]]:
    """Each row's q, k, v, key by key out of the cache."""
    q, k_cache, v_cache, step = case.args
    assert isinstance(step, Step)
    sequences, start = [], 0
    for row, (q_len, kv_len) in enumerate(zip(step.q_lens, step.kv_lens_host, strict=True)):
        keys = [
            [key_at(cache, case, step, row, j, name) for j in range(kv_len)]
            for cache, name in ((k_cache, "k_scale"), (v_cache, "v_scale"))
        ]
        heads = case.request.num_kv_heads
        empty = [torch.zeros(0, heads, d) for d in (case.request.head_dim, case.request.v_head_dim)]
        k, v = (torch.stack(x) if x else none for x, none in zip(keys, empty, strict=True))
        sequences.append((q[start : start + q_len], k, v))
        start += q_len
    return sequences


def key_at(cache: Tensor, case: AttentionCase, step: Step, row: int, position: int, name: str) -> Tensor:
    page, offset = int(step.block_table[row, position // step.page_size]), position % step.page_size
    places = {"NHD": (page, offset), "HND": (page, slice(None), offset), "HDN": (page, ..., offset)}
    if case.request.kv_layout == "HDN" and name == "k_scale":
        places["HDN"] = (page, ..., offset, slice(None))
    found = cache[places[case.request.kv_layout]].flatten(1).double()
    return found * case.kwargs[name].double().view(-1, 1) if name in case.kwargs else found


def assert_same(found: Any, wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found["out"], wanted[0], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found["lse"], wanted[1], atol=1e-12, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(request=requests(), lengths=rows, seed=st.integers(0, 9))
def test_ragged_prefill(naive: Naive, request: AttentionRequest, lengths: list[tuple[int, int]], seed: int) -> None:
    # requirement X11, X12
    case = make_case(request, "prefill", lengths=lengths, seed=seed)
    q, k, v = case.args
    q_lens, kv_lens = ([pair[i] for pair in lengths] for i in (0, 1))
    sequences = list(zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True))
    assert_same(case.expected(), naive_of(case, naive, sequences))


@settings(deadline=None, max_examples=60)
@given(request=requests(), lengths=rows, seed=st.integers(0, 9))
def test_paged(naive: Naive, request: AttentionRequest, lengths: list[tuple[int, int]], seed: int) -> None:
    # requirement X11, B6, D12, D15
    for phase in ("extend", "decode"):
        case = make_case(request, phase, lengths=lengths, seed=seed)
        assert_same(case.expected(), naive_of(case, naive, read_rows(case)))


def test_dense_prefill(naive: Naive, request_of: Callable[..., AttentionRequest]) -> None:
    for lengths in (((5, 5),) * 2, ((3, 7),) * 3, ((7, 3),), ((4, 0),) * 2, ((0, 4),) * 2):
        request = request_of(head_dim=8, return_lse=True, sinks=True, window=4)
        case = make_case(request, "prefill", lengths=lengths, form="dense")
        out, lse = naive_of(case, naive, list(zip(*case.args, strict=True)))
        found = case.call(reference.prefill(request, "cpu"))
        batch = len(lengths)
        torch.testing.assert_close(found["out"], out.float().view(batch, -1, 6, 8), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["lse"], lse.float().view(batch, -1, 6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys(request_of: Callable[..., AttentionRequest], sinks: bool) -> None:
    """Out 0 and lse -inf; with sinks, the sink is all there is in the denominator."""
    request = request_of(return_lse=True, sinks=sinks)
    case = make_case(request, "prefill", lengths=((4, 0), (5, 3)))
    found = case.call(reference.prefill(request, "cpu"))
    empty = [0, 1, 2, 3, 4, 5]
    assert (found["out"][empty] == 0).all()
    wanted = case.kwargs["sinks"] if sinks else torch.full((6,), -torch.inf)
    torch.testing.assert_close(found["lse"][empty], wanted.expand(6, 6))
    assert found["lse"][6:].isfinite().all()
    assert found["out"][6:].abs().min() > 0


def test_no_sequences(request_of: Callable[..., AttentionRequest]) -> None:
    request = request_of(return_lse=True)
    none = torch.zeros(1, dtype=torch.int32)
    q, kv = torch.zeros(0, 6, 32), torch.zeros(0, 2, 32)
    out, lse = reference.prefill(request, "cpu")(q, kv, kv, cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 6, 32), (0, 6))


def test_gradients(request_of: Callable[..., AttentionRequest]) -> None:
    """Through out and lse, to q, k, v, sinks and slopes; rows without keys and softcap included."""
    request = request_of(head_dim=4, v_head_dim=3, needs_grad=True, sinks=True, alibi=True, softcap=2.0, window=3)
    request = request.replace(num_q_heads=2, num_kv_heads=1, dtype="float64")
    call = reference.prefill(request, "cpu", rounded=False)
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 2, 4), (1, 3, 1, 4), (1, 3, 1, 3), (2,), (2,))
    args = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return call(q, k, v, sinks=sinks, alibi_slopes=slopes, return_lse=True)

    assert torch.autograd.gradcheck(run, args)


def test_many_scores_are_taken_in_parts(
    request_of: Callable[..., AttentionRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(request_of(return_lse=True, window=7), "prefill", lengths=((33, 40),))
    whole = case.expected()
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 40 * 6 * 4)
    torch.testing.assert_close(case.expected(), whole)


@pytest.mark.parametrize("field", ["sinks", "alibi"])
@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_a_tensor_is_neither_missed_nor_dropped(
    request_of: Callable[..., AttentionRequest], phase: str, field: str
) -> None:
    # requirement C7, P24
    with_it = make_case(request_of(**{field: True}), phase)
    without = make_case(request_of(), phase)
    with pytest.raises(ValueError, match=f"{field}=True.*brings no tensor"):
        without.call(getattr(reference, phase)(with_it.request, "cpu"))
    with pytest.raises(ValueError, match=f"{field}=False"):
        with_it.call(getattr(reference, phase)(without.request, "cpu"))
