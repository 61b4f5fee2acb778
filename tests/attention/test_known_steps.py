"""A step like the last one is not checked again; one that differs in anything that is checked, is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_requests import SMALL

import hal
from hal import _inputs, _mla, _same
from hal.errors import InputError, PlanMismatchError


def step(tokens: int = 2) -> dict[str, Any]:
    return {"q": torch.randn(tokens, 4, 8), "k": torch.randn(tokens, 2, 8), "v": torch.randn(tokens, 2, 8)}


@pytest.fixture(params=["guard", "compare"])
def handle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[hal.Attention]:
    monkeypatch.setattr(_same, "like", getattr(_same, request.param))
    hal.reset()
    yield hal.get_attention(**SMALL)
    hal.reset()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step had that was checked."""
    seen: list[int] = []
    real = _inputs.check_step

    def check(owner: Any, q: Any, k: Any, v: Any, plan: Any) -> None:
        seen.append(plan.num_tokens)
        real(owner, q, k, v, plan)

    monkeypatch.setattr(_inputs, "check_step", check)
    return seen


def plan_of(handle: hal.Attention, tokens: int = 2, **sizes: int) -> hal.Plan:
    return handle.plan(
        q_lens=[1] * tokens, kv_lens=[5] * tokens, block_table=[[0, 1], [2, 3], [4, 5]][:tokens], **sizes
    )


def test_layers_and_steps_alike_are_checked_once(
    handle: hal.Attention, checks: list[int]
) -> None:  # requirement C6, B10
    caches = [handle.allocate_kv_cache(6) for _ in range(3)]
    for _ in range(2):
        plan = plan_of(handle)
        for cache in caches:
            given = step()
            out = handle(**given, cache=cache, plan=plan)
            assert torch.equal(cache.k.view(-1, 2, 8)[[4, 12]], given["k"]), "written"
            assert torch.equal(handle(given["q"], cache=cache, plan=plan), out), "and read"
    # Calls with and without k and v take turns here, and are told apart.
    assert checks == [2] * 12
    checks.clear()
    for _ in range(3):
        handle(**given, cache=cache, plan=plan)
    assert checks == [2]
    handle(**step(3), cache=cache, plan=plan_of(handle, 3))
    assert checks == [2, 3]


def test_what_differs_is_still_refused(handle: hal.Attention) -> None:  # requirement C7, B3
    cache, plan, given = handle.allocate_kv_cache(6), plan_of(handle), step()
    right = handle(**given, cache=cache, plan=plan)
    assert handle._is_known(**given, cache=cache, plan=plan)
    other = hal.get_attention(**SMALL, causal=False)
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"plan": plan_of(other)}, PlanMismatchError),
        ({"plan": plan_of(handle, 3)}, InputError),
        ({"plan": None}, InputError),
        ({"cache": None}, InputError),
        ({"cache": hal.get_attention(**SMALL, kv_layout="HND").allocate_kv_cache(6)}, InputError),
        ({"k": None}, InputError),
        ({"v": None}, InputError),
        ({"q": given["q"].double()}, InputError),
        ({"k": given["k"][:1]}, InputError),
        ({"v": given["v"].requires_grad_()}, InputError),
    ]
    for change, error in wrong:
        with pytest.raises(error):
            handle(**{**given, "v": step()["v"], "cache": cache, "plan": plan, **change})
    given["v"] = given["v"].detach()
    assert torch.equal(handle(**given, cache=cache, plan=plan), right)


def test_sinks_are_asked_for_each_time(checks: list[int]) -> None:  # requirement C7
    handle = hal.get_attention(**SMALL, sinks=True)
    cache, plan, given = handle.allocate_kv_cache(6), plan_of(handle), step()
    for _ in range(2):
        handle(**given, cache=cache, plan=plan, sinks=torch.zeros(4))
        with pytest.raises(InputError, match="sinks is missing"):
            handle(**given, cache=cache, plan=plan)


def test_pages_are_checked_each_time_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement D15
    monkeypatch.setenv("HAL_DEBUG_CHECKS", "1")
    handle = hal.get_attention(**SMALL)
    cache, plan = handle.allocate_kv_cache(6), plan_of(handle, max_batch=2)
    handle(**step(), cache=cache, plan=plan)
    plan.update(q_lens=[1, 1], kv_lens=[5, 5], block_table=[[0, 1], [2, 9]])
    with pytest.raises(InputError, match="page 9"):
        handle(**step(), cache=cache, plan=plan)


@pytest.mark.parametrize("like", ["guard", "compare"])
def test_steps_of_latents_alike_are_checked_once(like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement C6, C7
    monkeypatch.setattr(_same, "like", getattr(_same, like))
    hal.reset()
    handle = hal.get_mla_attention(
        num_q_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, dtype="float32",
        device="cpu", page_size=4,
    )  # fmt: skip
    seen: list[int] = []
    real = _mla.check_tensors
    monkeypatch.setattr(_mla, "check_tensors", lambda *args: (seen.append(len(args[1])), real(*args))[1])
    cache = handle.allocate_kv_cache(6)
    plan = handle.plan(q_lens=[1, 1], kv_lens=[5, 5], block_table=[[0, 1], [2, 3]])
    q, latent = torch.randn(2, 2, 24), torch.randn(2, 24)
    outs = [handle(q, latent, cache=cache, plan=plan) for _ in range(3)]
    assert seen == [2]
    assert torch.equal(outs[0], outs[2])
    cache.data = torch.zeros_like(cache.data)
    handle(q, latent, cache=cache, plan=plan)
    assert torch.equal(cache.data[1, 0], latent[0]), "what replaced the pages is written to"
    for wrong in ({"q": q[:1]}, {"latent": latent.double()}, {"latent": latent.requires_grad_()}):
        with pytest.raises(InputError):
            handle(**{"q": q, "latent": latent.detach(), **wrong}, cache=cache, plan=plan)
    hal.reset()
