"""``hal.get_mla_attention``: steps over a cache of latents equal attention with a key and a value a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal
from hal.errors import InputError, NoKernelError, PlanMismatchError

HEADS, RANK, ROPE, NOPE, V_DIM = 4, 32, 16, 24, 20
SMALL: dict[str, Any] = {
    "num_q_heads": HEADS,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": V_DIM,
    "dtype": "float32",
    "page_size": 4,
    "device": "cpu",
}


class Layer:
    """A layer's projections, and what expanded attention makes of all tokens of a sequence at once."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.w_uk = torch.randn(HEADS, NOPE, RANK, generator=self.draw) / RANK**0.5
        self.w_uv = torch.randn(HEADS, V_DIM, RANK, generator=self.draw) / RANK**0.5

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q a head, and cache entries."""
        return (
            torch.randn(count, HEADS, NOPE + ROPE, generator=self.draw),
            torch.randn(count, RANK + ROPE, generator=self.draw),
        )

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.einsum("hdr,thd->thr", self.w_uk, q[..., :NOPE]), q[..., NOPE:]], -1)

    def values(self, out: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hdr,thr->thd", self.w_uv, out)

    def expand(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v a head."""
        k = torch.einsum("hdr,tr->thd", self.w_uk, latent[:, :RANK])
        k = torch.cat([k, latent[:, None, RANK:].expand(-1, HEADS, -1)], -1)
        return k, torch.einsum("hdr,tr->thd", self.w_uv, latent[:, :RANK])

    def naive(self, q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        k, v = self.expand(latent)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (NOPE + ROPE) ** -0.5
        hidden = ~torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)


def test_step_by_step_equals_expanded_attention() -> None:
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    cache = handle.allocate_kv_cache(12)
    cache.data.fill_(float("nan"))
    tables = [[3, 0, 7, 9], [1, 8, 2, 5]]
    sequences = [layer.tokens(14) for _ in tables]
    right = [layer.naive(*sequence) for sequence in sequences]
    done = [0, 0]
    for counts in ([5, 3], [1, 1], [4, 0], [1, 1], [0, 6], [1, 1]):
        parts = [(q[d : d + n], e[d : d + n]) for (q, e), d, n in zip(sequences, done, counts, strict=True)]
        done = [d + n for d, n in zip(done, counts, strict=True)]
        plan = handle.plan(q_lens=counts, kv_lens=done, block_table=tables)
        assert plan.phase == ("decode" if counts == [1, 1] else "extend")
        q, latent = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        out = layer.values(handle(layer.absorb(q), latent, cache=cache, plan=plan))
        expected = torch.cat([r[d - n : d] for r, d, n in zip(right, done, counts, strict=True)])
        close(out, expected)
        close(layer.values(handle(layer.absorb(q), cache=cache, plan=plan)), expected)


def test_prompts_by_prefill_and_tokens_by_decode() -> None:
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    cache = handle.allocate_kv_cache(4)
    q, latent = layer.tokens(7)
    plan = handle.plan(q_lens=[6], kv_lens=[6], block_table=[[2, 1]])
    handle.write(latent[:6], cache=cache, plan=plan)
    k, v = layer.expand(latent[:6])
    right = layer.naive(q, latent)
    close(handle.prefill(q[None, :6], k[None], v[None])[0], right[:6])
    plan = handle.plan(q_lens=[1], kv_lens=[7], block_table=[[2, 1]])
    close(layer.values(handle(layer.absorb(q[6:]), latent[6:], cache=cache, plan=plan)), right[6:])


def test_speculative_queries_and_the_lse() -> None:
    handle, layer = hal.get_mla_attention(**SMALL, max_q_len=3, return_lse=True), Layer()
    cache = handle.allocate_kv_cache(4)
    q, latent = layer.tokens(9)
    handle(
        layer.absorb(q[:6]), latent[:6], cache=cache, plan=handle.plan(q_lens=[6], kv_lens=[6], block_table=[[0, 3, 1]])
    )
    plan = handle.plan(q_lens=[3], kv_lens=[9], block_table=[[0, 3, 1]])
    assert plan.phase == "decode"
    out, lse = handle(layer.absorb(q[6:]), latent[6:], cache=cache, plan=plan, return_lse=True)
    close(layer.values(out), layer.naive(q[6:], latent))
    assert lse.shape == (3, HEADS)
    assert lse.dtype == torch.float32


def test_a_plan_with_buffers_serves_smaller_steps() -> None:
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    cache = handle.allocate_kv_cache(6)
    sequences = [layer.tokens(6) for _ in range(2)]
    fill = handle.plan(q_lens=[5, 5], kv_lens=[5, 5], block_table=[[0, 1], [4, 5]])
    handle.write(torch.cat([e[:5] for _, e in sequences]), cache=cache, plan=fill)
    plan = handle.plan(q_lens=[1, 1], kv_lens=[6, 6], block_table=[[0, 1], [4, 5]], max_batch=3)
    table = plan._step.block_table.data_ptr()
    for rows in ([0, 1], [1]):
        q, latent = (torch.cat([sequences[r][i][5:] for r in rows]) for i in (0, 1))
        pages = [[[0, 1], [4, 5]][r] for r in rows]
        plan.update(q_lens=[1] * len(rows), kv_lens=[6] * len(rows), block_table=pages)
        padded = torch.zeros(3, HEADS, RANK + ROPE)
        padded[: len(rows)] = layer.absorb(q)
        entries = torch.full((3, RANK + ROPE), float("nan"))
        entries[: len(rows)] = latent
        out = handle(padded, entries, cache=cache, plan=plan)[: len(rows)]
        close(layer.values(out), torch.cat([layer.naive(*sequences[r])[5:] for r in rows]))
        assert plan._step.block_table.data_ptr() == table
    assert not cache.data.isnan().any()


def test_equal_requests_give_one_handle_that_explains_itself() -> None:
    handle = hal.get_mla_attention(**SMALL)
    assert hal.get_mla_attention(**SMALL) is handle
    assert hal.get_mla_attention(**SMALL, causal=False) is not handle
    assert handle.kernels() == {
        "prefill": "torch_cpu.prefill",
        "extend": "torch_cpu.mla_extend",
        "decode": "torch_cpu.mla_decode",
        "write": "torch.kv_cache_write",
    }
    for name in handle.kernels().values():
        assert name in handle.explain()
    assert handle.receipt()["op"] == "mla_attention"
    assert handle.receipt() in hal.receipts()
    assert handle._write_selection.receipt() in hal.receipts()
    assert "torch_cpu.mla_decode" in repr(handle)
    assert callable(handle.implementation("decode"))
    with pytest.raises(InputError, match="not for 'prefill'"):
        handle.implementation("prefill")


def test_forcing_and_refusal() -> None:
    handle = hal.get_mla_attention(**SMALL, kernel={"decode": "reference.mla_decode"})
    assert handle.kernels()["decode"] == "reference.mla_decode"
    assert handle.kernels()["extend"] == "torch_cpu.mla_extend"
    with pytest.raises(NoKernelError, match="kv_dtype"):
        hal.get_mla_attention(**SMALL, kv_dtype="int8")


@pytest.mark.parametrize("kernel", [None, "torch", "reference"])
@pytest.mark.parametrize("kv_dtype", ["fp8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"])
def test_an_fp8_cache_is_read_as_it_was_written(kv_dtype: str, kernel: str | None) -> None:  # requirement B6
    handle, layer = hal.get_mla_attention(**SMALL, kv_dtype=kv_dtype, kernel=kernel), Layer()
    exact = "float8_e4m3fn" if kv_dtype == "fp8" else kv_dtype
    assert handle.request.kv_dtype == exact
    stored = getattr(torch, exact)
    for scale in (0.3, torch.tensor(2.0), None):
        cache = handle.allocate_kv_cache(4, kv_scale=scale)
        factor = 1.0 if scale is None else float(scale)
        assert (cache.dtype, cache.kv_scale.dtype) == (exact, torch.float32)
        assert cache.kv_scale.tolist() == pytest.approx([factor])
        q, latent = layer.tokens(7)
        latent[0, 0], latent[1, -1] = 1e9, -1e9
        kept = (latent / factor).clamp(-torch.finfo(stored).max, torch.finfo(stored).max).to(stored).float() * factor
        for start, end in ((0, 5), (5, 6), (6, 7)):
            plan = handle.plan(q_lens=[end - start], kv_lens=[end], block_table=[[2, 1]])
            out = handle(layer.absorb(q[start:end]), latent[start:end], cache=cache, plan=plan)
            assert out.dtype == torch.float32
            torch.testing.assert_close(layer.values(out), layer.naive(q, kept)[start:end], atol=2e-4, rtol=2e-4)
        written = cache.data[[2, 1]].flatten(0, 1)[:7].float() * factor
        torch.testing.assert_close(written, kept, atol=0.0, rtol=1e-6)


def test_a_scale_is_for_fp8_caches_and_is_one_number() -> None:  # requirement B7
    handle = hal.get_mla_attention(**SMALL)
    assert handle.allocate_kv_cache(2).kv_scale is None
    with pytest.raises(InputError, match="only FP8 caches are scaled"):
        handle.allocate_kv_cache(2, kv_scale=0.5)
    pages = torch.zeros(2, 4, 48, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="kv_scale has 2 values"):
        hal.MlaCache(pages, kv_scale=[0.5, 2.0])
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    with pytest.raises(InputError, match="dtype is float8_e4m3fn, not float32"):
        handle(torch.zeros(1, 4, 48), cache=hal.MlaCache(pages), plan=plan)


def test_arguments_are_checked_before_anything_is_written() -> None:
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    other = hal.get_mla_attention(**SMALL, causal=False)
    cache = handle.allocate_kv_cache(2)
    q, latent = layer.tokens(2)
    q = layer.absorb(q)
    plan = handle.plan(q_lens=[2], kv_lens=[2], block_table=[[0]])
    fits = {"q": q, "latent": latent, "cache": cache, "plan": plan}
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"q": q[:, :2]}, InputError, "q is .2, 2, 48.: give"),
        ({"q": q[..., :40]}, InputError, "latent part, then rotated"),
        ({"q": q.half()}, InputError, "float16"),
        ({"q": q.transpose(1, 2).contiguous().transpose(1, 2)}, InputError, "contiguous"),
        ({"latent": latent[:1]}, InputError, "latent has 1 tokens, the plan 2"),
        ({"latent": latent.unsqueeze(1)}, InputError, "latent is"),
        ({"q": q[:1], "latent": latent[:1]}, InputError, "q has 1 tokens"),
        ({"return_lse": True}, InputError, "return_lse"),
        ({"cache": hal.MlaCache(torch.zeros(2, 8, 48))}, InputError, "page_size is 8, not 4"),
        ({"cache": hal.MlaCache(torch.zeros(2, 4, 40))}, InputError, "40 elements, not 48"),
        ({"cache": hal.MlaCache(torch.zeros(2, 4, 48).half())}, InputError, "dtype is float16"),
        ({"plan": other.plan(q_lens=[2], kv_lens=[2], block_table=[[0]])}, PlanMismatchError, "another|made by"),
    ]
    for change, error, words in wrong:
        with pytest.raises(error, match=words):
            handle(**{**fits, **change})
    with pytest.raises(InputError, match="num_pages"):
        handle.allocate_kv_cache(0)
    with pytest.raises(InputError, match="num_pages, page_size"):
        hal.MlaCache(torch.zeros(2, 4, 1, 48))
    with pytest.raises(InputError, match="contiguous"):
        hal.MlaCache(torch.zeros(2, 4, 96)[..., ::2])
    assert not cache.data.any()


def test_a_cache_may_be_a_view_of_larger_memory() -> None:
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    pool = torch.full((3, 2, 4, 64), float("nan"))
    cache = hal.MlaCache(pool[:, 1, :, : RANK + ROPE])
    q, latent = layer.tokens(6)
    plan = handle.plan(q_lens=[6], kv_lens=[6], block_table=[[2, 0]])
    close(layer.values(handle(layer.absorb(q), latent, cache=cache, plan=plan)), layer.naive(q, latent))
    assert pool[:, 0].isnan().all()
    assert pool[..., RANK + ROPE :].isnan().all()
    assert (cache.num_pages, cache.page_size, cache.dtype) == (3, 4, "float32")
    assert "3 pages of 4" in repr(cache)


def test_pages_are_checked_on_request(monkeypatch: Any) -> None:
    monkeypatch.setenv("HAL_DEBUG_CHECKS", "1")
    handle, layer = hal.get_mla_attention(**SMALL), Layer()
    q, latent = layer.tokens(2)
    plan = handle.plan(q_lens=[2], kv_lens=[2], block_table=[[7]])
    with pytest.raises(InputError, match="page 7"):
        handle(layer.absorb(q), latent, cache=handle.allocate_kv_cache(2), plan=plan)
