"""``record``: what ``dataclasses.dataclass(frozen=True)`` promises, without what it costs to define."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from hal_ops import Request, record, required
from hal_ops.attention import AttentionRequest


@record(frozen=True)
class Pair:
    """Two values."""

    one: int
    two: tuple[int, ...] = ()
    more: dict[str, int] = dataclasses.field(default_factory=dict, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Plain:
    """The same from Python."""

    one: int
    two: tuple[int, ...] = ()
    more: dict[str, int] = dataclasses.field(default_factory=dict, repr=False, compare=False)


@record(frozen=True, kw_only=True)
class Wide(Pair):
    """With a further field, by keyword only."""

    three: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "three", self.three + 1)


def test_it_is_a_frozen_dataclass() -> None:
    pair = Pair(1, (2,))
    assert repr(pair) == repr(Plain(1, (2,))).replace("Plain", "Pair")
    assert pair == Pair(one=1, two=(2,), more={"x": 1}) != Pair(1)
    assert hash(pair) == hash(Plain(1, (2,)))
    assert pair != Plain(1, (2,))
    assert dataclasses.asdict(pair) == dataclasses.asdict(Plain(1, (2,)))
    assert dataclasses.replace(pair, one=3) == Pair(3, (2,))
    assert pickle.loads(pickle.dumps(pair)) == pair == copy.deepcopy(pair)
    assert Pair(1).more is not Pair(1).more
    for change in (lambda p: setattr(p, "one", 2), lambda p: delattr(p, "one"), lambda p: setattr(p, "new", 2)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change(pair)


@record(frozen=False)
class Open:
    """One that may change."""

    one: int
    two: tuple[int, ...] = ()


def test_it_may_be_open_to_changes() -> None:
    value = Open(1)
    value.two = (2,)
    assert value == Open(1, (2,)) == dataclasses.replace(Open(3), one=1, two=(2,)) == pickle.loads(pickle.dumps(value))
    assert not Open.__dataclass_params__.frozen  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_fields_are_inherited_and_set_up_once_all_are_there() -> None:
    assert (Wide(1).one, Wide(1, three=5).three) == (1, 6)
    assert [f.name for f in dataclasses.fields(Wide)] == ["one", "two", "more", "three"]
    with pytest.raises(TypeError, match="too many positional"):
        Wide(1, (), {}, 4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "missing a required argument: 'one'"),
        ((1,), {"one": 2}, "multiple values for argument 'one'"),
        ((1,), {"four": 2}, "unexpected keyword argument 'four'"),
    ],
)
def test_wrong_arguments_are_refused_as_python_does(args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^Pair: .*{text}"):
        Pair(*args, **kwargs)


def test_its_signature_is_that_of_a_dataclass() -> None:
    names = [(p.name, p.kind) for p in inspect.signature(Plain).parameters.values()]
    assert [(p.name, p.kind) for p in inspect.signature(Pair).parameters.values()] == names
    assert inspect.signature(Wide).parameters["three"].kind is inspect.Parameter.KEYWORD_ONLY


def test_others_may_derive_frozen_dataclasses_from_ours() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(AttentionRequest):
        latent: int = required(default=64)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class New(Request):
        op = "new"
        size: int = required()

    mine = Mine(num_q_heads=8, num_kv_heads=2, head_dim=64)
    assert mine.replace(latent=8) == Mine(num_q_heads=8, num_kv_heads=2, head_dim=64, latent=8)
    assert {"latent", "page_size"} <= Mine.rules().keys()
    assert New(size=3).as_dict() == {"size": 3}
