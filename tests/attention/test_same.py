"""The hot path's recognition of arguments: both ways must see every difference that matters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hal
from hal import _same
from hal.errors import InputError


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 5, 6, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 8)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "dtype": lambda t: t.half(),
    "length": lambda t: t[:, :4],
    "heads": lambda t: t.repeat(1, 1, 2, 1),
    "dim": lambda t: t[..., :4],
    "rank": lambda t: t[0],
    "order of dims": lambda t: t.transpose(1, 2),
    "strides": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "device": lambda t: t.to("meta"),
    "None": lambda t: None,
}


@pytest.mark.parametrize("way", [_same.guard, _same.compare])
def test_other_values_of_the_same_form_are_recognised(way: Any) -> None:
    same = way(*made())
    assert same(*made())


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", [_same.guard, _same.compare])
def test_any_difference_is_seen(way: Any, change: str, which: int) -> None:
    same = way(*made())
    if change == "None" and which == 0 and way is _same.compare:
        pytest.skip("q is never None: it is the handle's positional argument")
    tensors: list[Any] = list(made())
    tensors[which] = CHANGES[change](tensors[which])
    assert not same(*tensors)


def test_a_handle_that_looks_first_is_called_as_it_says() -> None:
    handle = hal.get_attention(num_q_heads=6, num_kv_heads=2, head_dim=16, v_head_dim=8, dtype="float32", device="cpu")
    names = list(inspect.signature(handle).parameters)
    assert names[:5] == ["q", "k", "v", "cache", "plan"]
    assert "return_lse" in names
    q, k, v = made()
    out = handle(q, k, v)
    assert torch.equal(handle(q=q, k=k, v=v, cache=None, sinks=None), out)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        handle(q, k, v, mask=None)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="k and v are missing"):
        handle(q)


def test_what_is_made_for_tensors_is_called_with_no_others() -> None:
    """A kernel may leave out for known tensors what it looks at otherwise: here, whether q and k are of one length."""
    request: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 4, "head_dim": 16, "dtype": "float32", "device": "cpu"}
    handle, oracle = hal.get_attention(**request), hal.get_attention(**request, kernel="reference")
    for q_len, kv_len in ((5, 5), (2, 5), (5, 5), (1, 5), (5, 9), (9, 9)):
        q, k, v = torch.randn(2, q_len, 4, 16), torch.randn(2, kv_len, 4, 16), torch.randn(2, kv_len, 4, 16)
        for _ in range(2):
            torch.testing.assert_close(handle(q, k, v), oracle(q, k, v))


def test_a_step_that_is_known_is_looked_at_again_for_another_plan() -> None:
    handle = hal.get_attention(num_q_heads=2, num_kv_heads=2, head_dim=16, dtype="float32", device="cpu")
    cache = handle.allocate_kv_cache(4)
    one = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    two = handle.plan(q_lens=[1, 1], kv_lens=[1, 1], block_table=[[0], [1]])
    q = torch.randn(1, 2, 16)
    for _ in range(2):
        handle(q, q, q, cache=cache, plan=one)
    with pytest.raises(InputError, match="q has 1 tokens, the plan 2"):
        handle(q, q, q, cache=cache, plan=two)
    with pytest.raises(InputError, match=r"k is torch\.float16"):
        handle(q, q.half(), q, cache=cache, plan=one)
    with pytest.raises(InputError, match="v is missing"):
        handle(q, q, cache=cache, plan=one)


def test_without_torch_s_guard_the_comparison_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._dynamo.guards as guards

    monkeypatch.delattr(guards, "TensorGuards")
    same = _same.like(*made())
    assert same(*made())
    assert not same(*(t.half() for t in made()))
