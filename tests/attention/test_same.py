"""The hot path's recognition of arguments: both ways must see every difference that matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal import _same


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


def test_without_torch_s_guard_the_comparison_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._dynamo.guards as guards

    monkeypatch.delattr(guards, "TensorGuards")
    same = _same.like(*made())
    assert same(*made())
    assert not same(*(t.half() for t in made()))
