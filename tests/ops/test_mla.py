"""The op ``mla_attention``: its request, its cases, the reference and the torch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hal_ops import FP8_DTYPES, resolve_target
from hal_ops.attention.cases import rounded
from hal_ops.attention.paged_inputs import make_step
from hal_ops.mla_attention import MLA_ATTENTION, PHASES, MlaAttentionRequest, torch_latent, torch_mla
from hal_ops.mla_attention.cases import make_case

REFERENCE = MLA_ATTENTION.reference

SMALL: dict[str, Any] = {
    "num_q_heads": 6,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "dtype": "float32",
    "page_size": 16,
}


def test_the_defaults_are_deepseek_v3s() -> None:
    request = MlaAttentionRequest(num_q_heads=128)
    assert request.describe() == "128 heads, latent 512+64, bfloat16, KV bfloat16, page_size auto, causal"
    assert request.softmax_scale == pytest.approx(192**-0.5)
    absorbed, expanded = request.absorbed(), request.expanded()
    assert (absorbed.num_kv_heads, absorbed.head_dim, absorbed.v_head_dim) == (1, 576, 512)
    assert (expanded.num_kv_heads, expanded.head_dim, expanded.v_head_dim) == (128, 192, 128)
    assert absorbed.softmax_scale == expanded.softmax_scale == request.softmax_scale
    assert (absorbed.phases, expanded.phases) == (PHASES, ("prefill",))


def test_what_is_asked_for_reaches_both_forms() -> None:
    request = MlaAttentionRequest(
        **SMALL, kv_dtype="float64", max_q_len=3, softmax_scale=0.5, causal=False, return_lse=True, deterministic=True,
        graph=True, phases="decode",
    )  # fmt: skip
    absorbed = request.absorbed()
    assert (absorbed.kv_dtype, absorbed.max_q_len, absorbed.page_size) == ("float64", 3, 16)
    assert absorbed.graph
    assert absorbed.phases == ("decode",)
    for made in (absorbed, request.expanded()):
        assert (made.softmax_scale, made.causal, made.return_lse, made.deterministic) == (0.5, False, True, True)
    assert request.replace(phases=None).phases == PHASES
    for word in ("softmax_scale 0.5", "return_lse", "graph", "bidirectional", "max_q_len 3", "decode only"):
        assert word in request.describe()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_q_heads", 0),
        ("kv_lora_rank", -1),
        ("page_size", 0),
        ("phases", "prefill"),
        ("softmax_scale", float("nan")),
    ],
)
def test_what_no_kernel_could_honour_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        MlaAttentionRequest(**{**SMALL, field: value})


def test_a_computed_scale_follows_its_dims() -> None:
    request = MlaAttentionRequest(**SMALL)
    assert request.replace(qk_nope_head_dim=48).softmax_scale == 64**-0.5
    assert request.replace(softmax_scale=0.3).replace(qk_nope_head_dim=48).softmax_scale == 0.3


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kv_dtype", FP8_DTYPES)
def test_an_fp8_cache_is_read_with_its_scale(phase: str, kv_dtype: str) -> None:  # requirement B6
    factories = (*(getattr(module, phase) for module in (torch_mla, torch_latent)), resolve_target(REFERENCE[phase]))
    for more in ({}, {"dtype": "bfloat16", "return_lse": True, "max_q_len": 3}, {"fp8_query": True, "page_size": 7}):
        request = MlaAttentionRequest(**{**SMALL, **more, "kv_dtype": kv_dtype})
        for scale in ("normal", "outliers"):
            case = make_case(request, phase, seed=1, scale=scale)
            assert case.kwargs["kv_scale"].tolist() == [0.5]
            assert case.args[1].float().isnan().any()
            for factory in factories:
                assert all(case.check(factory(request, "cpu")))
                assert not all(case.check(_Unscaled(factory(request, "cpu"))))


class _Unscaled:
    """An implementation that forgets the scale."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self.plan = made.plan

    def __call__(self, *args: Any, kv_scale: torch.Tensor, **keywords: Any) -> Any:
        return self._made(*args, **keywords)


@pytest.mark.parametrize("phase", PHASES)
def test_where_it_is_permitted_queries_may_be_rounded_and_not_elsewhere(phase: str) -> None:  # requirement B7
    request = MlaAttentionRequest(**{**SMALL, "dtype": "bfloat16", "kv_dtype": "float8_e4m3fn"})
    for permitted in (True, False):
        case = make_case(request.replace(fp8_query=permitted), phase, seed=1)
        made = torch_latent.extend(request, "cpu")
        assert all(case.check(_Rounding(made))) is permitted


class _Rounding:
    """An implementation that rounds its queries as FP8 kernels do."""

    def __init__(self, made: Any) -> None:
        self._made = made
        self.plan = made.plan

    def __call__(self, q: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        return self._made(rounded(q, "float8_e4m3fn"), *args, **keywords)


def test_fp8_is_the_flavour_of_the_device() -> None:
    request = MlaAttentionRequest(**SMALL, kv_dtype="fp8", fp8_query=True)
    assert request.resolved(frozenset({"fp8_e4m3fnuz"})).kv_dtype == "float8_e4m3fnuz"
    assert request.resolved(frozenset({"fp8_e4m3fn", "fp8_e4m3fnuz"})).absorbed().kv_dtype == "float8_e4m3fn"
    assert request.replace(kv_dtype="float8_e5m2").resolved(frozenset()).kv_dtype == "float8_e5m2"
    assert request.absorbed().fp8_query
    assert "KV fp8" in request.describe()
    assert "fp8_query" in request.describe()
    with pytest.raises(ValueError, match="this device declares none"):
        request.resolved(frozenset({"bf16"}))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_computes_what_the_reference_does(phase: str, dtype: str) -> None:
    for more in ({}, {"causal": False}, {"return_lse": True, "max_q_len": 3}, {"softmax_scale": 0.3, "page_size": 7}):
        request = MlaAttentionRequest(**{**SMALL, **more, "dtype": dtype})
        for scale in ("normal", "large", "outliers"):
            of_torch = (getattr(torch_mla, phase), getattr(torch_latent, phase))
            for factory in (*of_torch, resolve_target(REFERENCE[phase])):
                case = make_case(request, phase, seed=1, scale=scale)
                for comparison in case.check(factory(request, "cpu")):
                    assert comparison.ok, comparison


def test_the_reference_is_the_formula() -> None:
    request = MlaAttentionRequest(**SMALL, return_lse=True)
    draw = torch.Generator().manual_seed(0)
    q, cache = torch.randn(2, 6, 48, generator=draw), torch.randn(3, 16, 48, generator=draw)
    implementation = resolve_target(REFERENCE["extend"])(request, "cpu")
    step = make_step([2], [18], torch.tensor([[2, 0]]), 16)
    out, lse = implementation(q, cache, step, implementation.plan(step), return_lse=True)
    entries = torch.cat([cache[2], cache[0]])
    for token in range(2):
        for head in range(6):
            seen = entries[: 17 + token]
            scores = seen @ q[token, head] * 40**-0.5
            torch.testing.assert_close(out[token, head], scores.softmax(0) @ seen[:, :32], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[token, head], scores.logsumexp(0), atol=1e-5, rtol=1e-5)


def test_what_torch_does_not_do_it_refuses() -> None:
    for module in (torch_mla, torch_latent):
        with pytest.raises(ValueError, match="graph"):
            module.decode(MlaAttentionRequest(**SMALL, graph=True), "cpu")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("phase", PHASES)
def test_products_of_long_rows_are_cut(phase: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_latent, "_SCORES_AT_ONCE", 400)
    request = MlaAttentionRequest(**SMALL, max_q_len=3, causal=causal, return_lse=True)
    lengths = [(3, 50), (3, 48), (3, 50), (3, 3)] if phase == "decode" else [(40, 50), (7, 7), (0, 9), (7, 9), (0, 0)]
    case = make_case(request, phase, lengths=lengths)
    for comparison in case.check(torch_latent.extend(request, "cpu")):
        assert comparison.ok, comparison


def test_products_give_nothing_for_rows_without_keys() -> None:  # requirement B15
    request = MlaAttentionRequest(**SMALL, return_lse=True)
    step = make_step([1, 1], [0, 3], torch.tensor([[7], [0]]), 16)
    implementation = torch_latent.decode(request, "cpu")
    q, cache = torch.randn(3, 6, 48), torch.randn(1, 16, 48)
    out, lse = implementation(q, cache, step, implementation.plan(step), return_lse=True)
    assert [bool(row.any()) for row in out] == [False, True, False]
    assert [bool((row == -torch.inf).all()) for row in lse] == [True, False, True]
