"""Whatever is no tensor, no plan or no cache gives one clear error, by every way into a handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_requests import LATENT, SMALL
from torch import Tensor

import hal
from hal import _same
from hal.errors import InputError

NOTHING: dict[str, Callable[[Tensor], Any]] = {"numpy": lambda x: x.detach().numpy(), "list": lambda x: x.tolist()}


def tensors() -> dict[str, Any]:
    return {"q": torch.ones(1, 3, 4, 8), "k": torch.ones(1, 3, 2, 8), "v": torch.ones(1, 3, 2, 8)}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("kind", NOTHING)
def test_what_is_no_tensor(name: str, kind: str, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for like in (_same.guard, _same.compare):
        monkeypatch.setattr(_same, "like", like)
        handle = hal.get_attention(**SMALL, compile=traced)
        handle._known = (_same.never, handle._known[1])
        fresh = tensors()
        handle(**fresh)
        wrong = NOTHING[kind](fresh[name])
        with pytest.raises(InputError, match=f"{name} is a .*: give a tensor"):
            handle(**{**fresh, name: wrong})
        cache = handle.allocate_kv_cache(1)
        plan = handle.plan(q_lens=[3], kv_lens=[3], block_table=[[0]])
        step = {n: x[0] for n, x in fresh.items()}
        handle(**step, cache=cache, plan=plan)
        cache.k.zero_()
        with pytest.raises(InputError, match=f"{name} is a .*: give a tensor"):
            handle(**{**step, name: NOTHING[kind](step[name])}, cache=cache, plan=plan)
        assert not cache.k.any()


@pytest.mark.parametrize("traced", [False, True])
def test_q_that_is_missing(traced: bool) -> None:
    handle = hal.get_attention(**SMALL, compile=traced)
    with pytest.raises(InputError, match="q is None: give a tensor"):
        handle(**{**tensors(), "q": None})


@pytest.mark.parametrize("traced", [False, True])
def test_lengths_and_sinks_that_are_no_tensors(traced: bool) -> None:
    handle = hal.get_attention(**SMALL, sinks=True, alibi=True, compile=traced)
    heads, lengths = torch.zeros(4), torch.tensor([0, 3], dtype=torch.int32)
    given = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "sinks": heads, "alibi_slopes": heads}
    step = {n: x[0] for n, x in tensors().items()}
    handle(**step, **given)
    for name, value in given.items():
        with pytest.raises(InputError, match=f"{name} is a list: give a tensor"):
            handle(**step, **{**given, name: value.tolist()})


@pytest.mark.parametrize("traced", [False, True])
def test_plans_and_caches_that_are_none(traced: bool) -> None:
    handle, latent = hal.get_attention(**SMALL, compile=traced), hal.get_mla_attention(**LATENT)
    cache, other = handle.allocate_kv_cache(1), latent.allocate_kv_cache(1)
    plan = handle.plan(q_lens=[3], kv_lens=[3], block_table=[[0]])
    step = {n: x[0] for n, x in tensors().items()}
    for given, text in (
        ({"cache": cache, "plan": {}}, "plan is a dict: give a hal.Plan"),
        ({"cache": (cache.k, cache.v), "plan": plan}, "cache is a tuple: give a hal.KVCache"),
        ({"cache": other, "plan": plan}, "cache is a .*MlaCache: give a hal.KVCache"),
    ):
        with pytest.raises(InputError, match=text):
            handle(**step, **given)


def test_a_cache_of_keys_is_none_of_latents() -> None:
    handle, keys = hal.get_mla_attention(**LATENT), hal.get_attention(**SMALL).allocate_kv_cache(1)
    plan, cache = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]]), handle.allocate_kv_cache(1)
    q, latent = torch.ones(1, 2, 24), torch.ones(1, 24)
    none: Any = None
    for given, text in (
        ({"cache": keys, "plan": plan}, "cache is a .*KVCache: give a hal.MlaCache of this handle"),
        ({"cache": none, "plan": plan}, "cache is missing"),
        ({"cache": cache, "plan": none}, "plan is missing"),
    ):
        with pytest.raises(InputError, match=text):
            handle(q, latent, **given)
        with pytest.raises(InputError, match=text):
            handle.write(latent, **given)
    for name, one, two in (("q", q.numpy(), latent), ("q", none, latent), ("latent", q, latent.numpy())):
        with pytest.raises(InputError, match=f"{name} is .*: give a tensor"):
            handle(one, two, cache=cache, plan=plan)
    assert not cache.data.any()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_a_gradient_of_what_stands_beside_is_not_lost_either(name: str, traced: bool) -> None:  # requirement R12
    handle = hal.get_attention(**SMALL, sinks=True, alibi=True, compile=traced)
    given = {"sinks": torch.zeros(4), "alibi_slopes": torch.zeros(4)}
    given[name].requires_grad_()
    with pytest.raises(InputError, match=f"{name} requires a gradient.*ask for needs_grad=True"):
        handle(**tensors(), **given)
    with torch.no_grad():
        handle(**tensors(), **given)


@pytest.mark.parametrize("planned", [False, True])
def test_a_compiler_loses_no_gradient(planned: bool) -> None:  # requirement R12
    """It gives a node tensors that require none, so the call itself looks at what it is given."""
    handle = hal.get_attention(**SMALL, compile=True)
    more, given = {}, tensors()
    if planned:
        more["plan"] = handle.plan(q_lens=[3], kv_lens=[3], block_table=[[0]])
        more["cache"] = handle.allocate_kv_cache(1)
        given = {name: x[0] for name, x in given.items()}
    layer = torch.compile(lambda q, k, v: handle(q, k, v, **more) + q, backend="aot_eager", fullgraph=True)
    given["q"].requires_grad_()
    with torch.no_grad():
        layer(**given)
    with pytest.raises(Exception, match=r"q requires a gradient.*ask for needs_grad=True"):
        layer(**given)
