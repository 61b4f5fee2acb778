"""``hal.get_attention``: dense and ragged calls, the paged step, LSE, gradients, merging."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hal
from hal._ledger import Ledger, Row, identity
from hal_ops.attention import PHASES

SMALL: dict[str, Any] = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu"}


def tensors(tokens: int, *, batch: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    lead = (tokens,) if batch is None else (batch, tokens)
    return tuple(torch.randn(*lead, heads, 16).to(dtype) for heads in (6, 2, 2))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    """One sequence ``[len, heads, dim]``, by the formula."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(q.shape[0], k.shape[0]).tril(k.shape[0] - q.shape[0]).bool(), -torch.inf
        )
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def test_equal_requests_give_one_handle() -> None:  # requirement R6
    first, other = hal.get_attention(**SMALL), hal.get_attention(**SMALL, window=8)
    assert hal.get_attention(**SMALL) is first
    assert hal.get_attention(**SMALL, window=8) is other
    assert hal.get_attention(**{**SMALL, "dtype": torch.float32}).request == first.request


def test_a_kernel_that_fails_verification_leaves_the_handles_of_this_process(tmp_path: Any, monkeypatch: Any) -> None:
    # requirement X4
    monkeypatch.setenv("HAL_CACHE_DIR", str(tmp_path))
    before = hal.get_attention(**SMALL, page_size=16, kv_layout="NHD")
    kernel = hal._plugins.registry().kernels["torch_cpu.decode"]
    key, corner = identity(kernel, hal.device("cpu")), before.request.corner("decode")
    Ledger(tmp_path / "ledger.json").record([Row(kernel.name, key, corner, "failed", "off by 3", "2026-01-01")])
    after = hal.get_attention(**SMALL, page_size=16, kv_layout="NHD")
    assert before.kernels()["decode"] == "torch_cpu.decode"
    assert after.kernels()["decode"] == "reference.decode"
    assert "failed verification on this device on 2026-01-01: off by 3" in after.explain()
    elsewhere = hal.get_attention(**SMALL)
    assert elsewhere.kernels()["decode"] == "torch_cpu.decode"
    assert (elsewhere.request.page_size, elsewhere.request.kv_layout) != (16, "NHD")


def test_dense(subtests: Any) -> None:
    for causal in (True, False):
        handle = hal.get_attention(**SMALL, causal=causal)
        q, k, v = tensors(5, batch=2)
        expected = torch.stack([plain(*x, causal=causal) for x in zip(q, k, v, strict=True)])
        for _ in range(2):
            with subtests.test(causal=causal):
                torch.testing.assert_close(handle(q, k, v), expected)


def test_ragged() -> None:
    handle = hal.get_attention(**SMALL)
    q, k, v = tensors(9)
    cu = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    out = handle(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    expected = torch.cat([plain(q[a:b], k[a:b], v[a:b]) for a, b in ((0, 2), (2, 9))])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
def test_a_sequence_step_by_step_equals_the_whole(layout: str, kernel: str) -> None:  # requirement B9, D7, A5, C1
    handle = hal.get_attention(**SMALL, kv_layout=layout, page_size=4, kernel=kernel)
    q, k, v = tensors(13)
    cache = handle.allocate_kv_cache(num_pages=6)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    table = [[5, 0, 3, 2, 1]]
    done, pieces, phases = 0, [], []
    for length in (5, 3, 1, 1, 3):
        plan = handle.plan(q_lens=[length], kv_lens=[done + length], block_table=table)
        rows = slice(done, done + length)
        pieces.append(handle(q[rows], k[rows], v[rows], cache=cache, plan=plan))
        phases.append(plan.phase)
        done += length
    torch.testing.assert_close(torch.cat(pieces), plain(q, k, v))
    assert phases[1:] == ["extend", "decode", "decode", "extend"]


def test_a_mixed_batch_and_k_and_v_that_are_there_already() -> None:  # requirement D5
    handle = hal.get_attention(**SMALL, page_size=4)
    q, k, v = tensors(11)
    cache = handle.allocate_kv_cache(num_pages=8)
    table = torch.tensor([[0, 1, 99999], [7, 3, -1], [2, -5, 4]], dtype=torch.int32)
    first = handle.plan(q_lens=[6, 4, 1], kv_lens=[6, 4, 1], block_table=table)
    whole = handle(q, k, v, cache=cache, plan=first)
    expected = torch.cat([plain(q[a:b], k[a:b], v[a:b]) for a, b in ((0, 6), (6, 10), (10, 11))])
    torch.testing.assert_close(whole, expected)
    again = handle(q, cache=cache, plan=first)
    torch.testing.assert_close(again, expected)


def test_prewrite_and_postwrite_agree_in_output_and_cache(fake_platform: Any, library: Any) -> None:  # requirement B8
    """The same step through prefill (write after) and through extend (write before)."""
    q, k, v = tensors(7)
    step = {"q_lens": [3, 4], "kv_lens": [3, 4], "block_table": [[2, 0], [1, 3]]}
    outs, caches, writes = [], [], []
    for phases in (PHASES, ("extend", "decode")):
        handle = hal.get_attention(**SMALL, page_size=4, phases=phases)
        cache = handle.allocate_kv_cache(num_pages=4)
        plan = handle.plan(**step)
        outs.append(handle(q, k, v, cache=cache, plan=plan))
        caches.append(cache)
        writes.append((plan.phase, plan.write))
    assert writes == [("prefill", "after"), ("extend", "before")]
    torch.testing.assert_close(outs[0], outs[1])
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)


@pytest.mark.parametrize(
    ("changes", "step", "phase"),
    [
        ({}, {"q_lens": [4], "kv_lens": [4]}, ("prefill", "after")),
        ({}, {"q_lens": [3], "kv_lens": [4]}, ("extend", "before")),
        ({}, {"q_lens": [4, 2], "kv_lens": [4, 4]}, ("extend", "before")),
        ({"kv_dtype": "float8_e4m3fn"}, {"q_lens": [4], "kv_lens": [4]}, ("extend", "before")),
        ({"kernel": "reference"}, {"q_lens": [4], "kv_lens": [4]}, ("extend", "before")),
        ({}, {"q_lens": [1, 1], "kv_lens": [4, 1]}, ("decode", "before")),
        ({"max_q_len": 3}, {"q_lens": [3, 3], "kv_lens": [4, 3]}, ("decode", "before")),
        ({"max_q_len": 3}, {"q_lens": [3, 2], "kv_lens": [4, 3]}, ("extend", "before")),
    ],
)
def test_which_phase_serves_a_step(
    changes: dict[str, Any], step: dict[str, Any], phase: tuple[str, str]
) -> None:  # requirement B8, B9, B16
    """Postwrite only with a performant prefill kernel, no FP8 cache and no cached prefix."""
    handle = hal.get_attention(**SMALL, page_size=4, **changes)
    plan = handle.plan(**step, block_table=[[0]] * len(step["q_lens"]))
    assert (plan.phase, plan.write) == phase


def test_lse_and_merging_two_parts_of_the_keys() -> None:  # requirement B15
    handle = hal.get_attention(**SMALL, causal=False, return_lse=True)
    q, k, v = tensors(8, batch=1)
    whole, lse = handle(q, k, v, return_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == q.shape[:-1]
    parts = [handle(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, None))]
    merged, merged_lse = hal.merge_attention_states(*parts[0], *parts[1])
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, lse)


def test_sinks_and_alibi_are_passed_at_the_call() -> None:  # requirement B13
    handle = hal.get_attention(**SMALL, sinks=True, alibi=True, causal=False)
    reference = hal.get_attention(**SMALL, sinks=True, alibi=True, causal=False, kernel="reference")
    q, k, v = tensors(5, batch=2)
    extras = {"sinks": torch.randn(6), "alibi_slopes": torch.rand(6)}
    torch.testing.assert_close(handle(q, k, v, **extras), reference(q, k, v, **extras))


def test_gradients() -> None:
    handle = hal.get_attention(**SMALL, needs_grad=True)
    inputs = [x.requires_grad_() for x in tensors(6, batch=1)]
    handle(*inputs).square().sum().backward()
    found = [x.grad.clone() for x in inputs]  # type: ignore[union-attr]
    for x in inputs:
        x.grad = None
    plain(*(x[0] for x in inputs)).square().sum().backward()
    for got, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["tensor", "head"])
def test_an_fp8_cache_with_scales(scale: str) -> None:  # requirement B6, B7, D12
    request = {**SMALL, "dtype": "bfloat16", "kv_dtype": "fp8", "kv_scale": scale}
    handle = hal.get_attention(**request, page_size=4)
    q, k, v = tensors(7, dtype=torch.bfloat16)
    scales = (0.5, 2.0) if scale == "tensor" else ([0.5, 2.0], [2.0, 0.25])
    cache = handle.allocate_kv_cache(num_pages=2, k_scale=scales[0], v_scale=scales[1])
    plan = handle.plan(q_lens=[7], kv_lens=[7], block_table=[[1, 0]])
    out = handle(q, k, v, cache=cache, plan=plan)
    assert out.dtype == torch.bfloat16
    assert handle.request.kv_dtype == "float8_e4m3fn"
    exact = plain(*(x.float() for x in (q, k, v)))
    relative = (out.float() - exact).norm() / exact.norm()
    assert 0 < relative < 0.08


def test_layers_that_differ_share_no_plan_and_no_metadata() -> None:  # requirement C4, C5, P35, P36
    full, window = hal.get_attention(**SMALL, page_size=4), hal.get_attention(**SMALL, page_size=4, window=2)
    q, k, v = tensors(6)
    step = {"q_lens": [6], "kv_lens": [6], "block_table": [[0, 1]]}
    plans = {h: h.plan(**step) for h in (full, window)}
    outs = [h(q, k, v, cache=h.allocate_kv_cache(2), plan=plans[h]) for h in (full, window, full)]
    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[1])
    with pytest.raises(hal.errors.PlanMismatchError, match="call plan\\(\\) on this one"):
        window(q, k, v, cache=window.allocate_kv_cache(2), plan=plans[full])


def test_several_layers_with_one_cache_layout() -> None:  # requirement P33
    common = {k: v for k, v in SMALL.items() if k != "device"}
    full, window = hal.get_attentions([common, {**common, "window": 4}], device="cpu")
    assert (full.request.page_size, full.request.kv_layout) == (window.request.page_size, window.request.kv_layout)


def test_what_one_layer_names_of_the_cache_is_of_all() -> None:  # requirement P33
    common = {k: v for k, v in SMALL.items() if k not in ("device", "page_size", "kv_layout")}
    named = {**common, "page_size": 32, "kv_layout": "HND"}
    for layers in ([named, {**common, "window": 4}], [common, {**named, "window": 4}]):
        made = hal.get_attentions(layers, device="cpu")
        assert {(h.request.page_size, h.request.kv_layout) for h in made} == {(32, "HND")}
    alone = hal.get_attentions([named, {**common, "phases": "prefill"}], device="cpu")[1]
    assert "write" not in alone.kernels(), "a layer without a cache is left alone"


def test_a_handle_explains_itself() -> None:  # requirement X19
    handle = hal.get_attention(**SMALL)
    text = handle.explain()
    for part in ("torch_cpu.prefill", "reference.decode", "torch.kv_cache_write", "precedence"):
        assert part in text
    assert handle.kernels()["write"] == "torch.kv_cache_write"
    assert handle.receipt() in hal.receipts()


def test_receipts_and_locks_cover_the_cache_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hal.reset()
    monkeypatch.setenv("HAL_OP_KV_CACHE_WRITE", "reference")
    assert hal.get_attention(**SMALL).kernels()["write"] == "reference.kv_cache_write"
    kept = {r["op"]: r["kernels"] for r in hal.receipts()}
    assert kept["kv_cache_write"]["call"]["kernel"] == "reference.kv_cache_write"
    hal.write_lock(tmp_path / "hal.lock", hal.receipts())
    mine = hal.receipts()
    monkeypatch.delenv("HAL_OP_KV_CACHE_WRITE")
    hal.reset()
    hal.get_attention(**SMALL)
    with pytest.raises(hal.errors.RankMismatchError, match=r"reference\.kv_cache_write -> torch\.kv_cache_write"):
        hal.assert_same_decisions(hal.receipts(), lambda other: [list(mine), other])
    monkeypatch.setenv("HAL_LOCK", str(tmp_path / "hal.lock"))
    assert hal.get_attention(**SMALL).kernels()["write"] == "reference.kv_cache_write"


def test_ragged_bounds_change_nothing() -> None:  # requirement D3
    handle = hal.get_attention(**SMALL)
    q, k, v = tensors(9)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    exact = handle(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for bound in (5, 10, 4096):
        out = handle(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=bound, max_seqlen_k=bound)
        assert torch.equal(out, exact)


def test_a_bound_call_runs_through_one_function_of_ours() -> None:  # requirement R7
    """Nothing on the hot path but the handle: no registry, no environment, no check function, no wrapper."""
    handle = hal.get_attention(**SMALL, causal=False)
    q, k, v = tensors(4, batch=1)
    for _ in range(2):
        handle(q, k, v)
    ran: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "/hal/" in frame.f_code.co_filename:
            ran.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        handle(q, k, v)
    finally:
        sys.setprofile(None)
    assert ran == ["handle"]
