"""Handles of ``get_op`` look at their arguments first: one clear error, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal.errors import InputError

CACHE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 16, "page_size": 4, "kv_dtype": "float32", "device": "cpu"}


def writing(layout: str = "NHD", **changes: Any) -> dict[str, Any]:
    """Arguments of a cache write of three tokens; all that is given stands in the place of what fits."""
    shapes = {"NHD": (3, 4, 2, 16), "HND": (3, 2, 4, 16)}
    found = {
        "k": torch.ones(3, 2, 16),
        "v": torch.ones(3, 2, 16),
        "k_cache": torch.zeros(shapes[layout]),
        "v_cache": torch.zeros(shapes[layout]),
        "slot_mapping": torch.arange(3),
    }
    return {**found, **changes}


WRONG_WRITES = {
    "another layout": (writing("HND"), r"k_cache is float32 \(3, 2, 4, 16\).*should be float32 \(3, 4, 2, 16\).*NHD"),
    "memory of another layout": (
        writing(k_cache=torch.zeros(3, 2, 4, 16).transpose(1, 2)), "bound as NHD.*are those of HND memory",
    ),
    "another format": (writing(k=torch.ones(3, 2, 16).half()), "k is float16.*should be float32"),
    "fewer heads": (writing(v=torch.ones(3, 1, 16)), r"v is float32 \(3, 1, 16\)"),
    "too few slots": (writing(slot_mapping=torch.arange(2)), r"slot_mapping is int64 \(2,\).*should be int64 \(3,\)"),
    "int32 slots": (writing(slot_mapping=torch.arange(3).int()), "slot_mapping is int32"),
    "a slot past the end": (writing(slot_mapping=torch.tensor([1, 99, 2])), r"slot_mapping\[1\] is 99.*12 slots"),
    "slots apart": (writing(slot_mapping=torch.arange(6)[::2]), r"slot_mapping has strides \(2,\): give a contiguous"),
    "no tensor": (writing(k=None), "k is missing"),
    "a scale": (writing(k_scale=torch.ones(1)), "only FP8 caches are scaled"),
    "a gradient": (writing(k=torch.ones(3, 2, 16, requires_grad=True)), "requires a gradient"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_WRITES)
def test_a_wrong_write_writes_nothing(what: str) -> None:  # requirement D8, P32
    given, text = WRONG_WRITES[what]
    write = hal.get_op("kv_cache_write", **CACHE, dtype="float32")
    with pytest.raises(InputError, match=f"kv_cache_write: .*{text}"):
        write(**given)
    assert all(not given[name].any() for name in ("k_cache", "v_cache"))


def test_scales_that_lie_apart() -> None:  # requirement D8
    write = hal.get_op("kv_cache_write", **{**CACHE, "kv_dtype": "float8_e4m3fn"}, dtype="float32", kv_scale="head")
    caches = {name: torch.zeros(3, 4, 2, 16).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    with pytest.raises(InputError, match=r"v_scale has strides \(2,\): give a contiguous one"):
        write(**writing(**caches, v_scale=torch.ones(4)[::2]))


def test_a_cache_in_vectors_is_known_by_its_shape() -> None:  # requirement D8
    write = hal.get_op("kv_cache_write", **CACHE, dtype="float32", kv_layout="HDN")
    k_cache, v_cache = torch.zeros(3, 2, 4, 4, 4), torch.zeros(3, 2, 16, 4)
    write(**writing(k_cache=k_cache, v_cache=v_cache))
    assert int(k_cache.sum()) == int(v_cache.sum()) == 96
    with pytest.raises(InputError, match=r"k_cache is .*should be float32 \(3, 2, 4, 4, 4\)"):
        write(**writing())


def states(**changes: Tensor) -> tuple[Tensor, ...]:
    found = {"out_a": torch.ones(4, 2, 8), "lse_a": torch.zeros(4, 2)}
    found |= {"out_b": torch.ones(4, 2, 8), "lse_b": torch.zeros(4, 2)}
    return tuple({**found, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lse_a": torch.zeros(4, 1)}, r"lse_a is float32 \(4, 1\).*should be float32 \(4, 2\)"),
        ({"lse_b": torch.zeros(2, 4)}, r"lse_b is float32 \(2, 4\)"),
        ({"out_b": torch.ones(1, 2, 8), "lse_b": torch.zeros(1, 2)}, r"out_b is float32 \(1, 2, 8\)"),
        ({"out_b": torch.ones(4, 2, 8).bfloat16()}, "out_b is bfloat16"),
        ({"lse_a": torch.zeros(4, 2).bfloat16()}, "lse_a is bfloat16"),
    ],
)
def test_states_that_do_not_go_together(changes: dict[str, Tensor], text: str) -> None:  # requirement B15
    with pytest.raises(InputError, match=text):
        hal.merge_attention_states(*states(**changes))


def test_a_merge_keeps_its_gradient() -> None:  # requirement R12
    """The front door asks for a backward where an input has one to want; a handle bound without one refuses."""
    given = [x.double().requires_grad_() for x in states()]
    given[1], given[3] = (x.detach().float().requires_grad_() for x in (given[1], given[3]))
    out, _ = hal.merge_attention_states(*(x.float() for x in given))
    torch.autograd.backward(out.sin().sum())
    assert all(x.grad is not None for x in given)
    bound = hal.get_op("merge_attention_states", num_heads=2, v_head_dim=8, dtype="float32", device="cpu")
    with pytest.raises(InputError, match="ask for needs_grad=True"):
        bound(*(x.detach().float().requires_grad_() for x in given))


def test_pages_that_are_not_there() -> None:  # requirement D15
    k_cache, v_cache = torch.zeros(2, 3, 4, 2, 16).unbind(0)
    copy = hal.get_op("kv_pages_copy", **CACHE)
    with pytest.raises(InputError, match=r"source\[0\] is 7, and the cache has 3 pages"):
        copy(k_cache, v_cache, torch.tensor([7]), torch.tensor([1]))
    gather = hal.get_op("kv_pages_gather", **CACHE)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(InputError, match=r"block_table\[0\]\[1\] is page 9, and the cache has 3"):
        gather(k_cache, v_cache, torch.tensor([[0, 9]], dtype=torch.int32), lengths, 5, 5)
    with pytest.raises(InputError, match="block_table has 1 pages a row, and the longest row 5 tokens"):
        gather(k_cache, v_cache, torch.tensor([[0]], dtype=torch.int32), lengths, 5, 5)


ROTARY: dict[str, Any] = {
    "q": torch.ones(3, 4, 16),
    "cos": torch.ones(8, 8),
    "sin": torch.zeros(8, 8),
    "positions": torch.arange(3),
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": torch.ones(3, 2, 16)}, r"q is float32 \(3, 2, 16\).*should be float32 \(3, 4, 16\)"),
        ({"sin": torch.zeros(8, 16)}, r"sin is float32 \(8, 16\).*should be float32 \(8, 8\)"),
        ({"positions": torch.arange(2)}, r"positions is int64 \(2,\)"),
        ({"positions": torch.arange(6)[::2]}, r"positions has strides \(2,\)"),
        ({"out": torch.ones(3, 4, 16).half()}, "out is float16"),
        *(WRONG_WRITES[name] for name in ("another layout", "too few slots", "a slot past the end", "a gradient")),
    ],
)
def test_a_wrong_write_with_rotary_writes_nothing(changes: dict[str, Any], text: str) -> None:  # requirement D8, P32
    given = {**writing(), **ROTARY, **changes}
    call = hal.get_op("rotary_kv_cache_write", **CACHE, num_q_heads=4, dtype="float32")
    with pytest.raises(InputError, match=f"rotary_kv_cache_write: .*{text}"):
        call(**given)
    assert all(not given[name].any() for name in ("k_cache", "v_cache"))


@pytest.mark.parametrize(
    ("states_", "text"),
    [
        ((None, None, None, None), "out_a is None: give a tensor"),
        ((*states()[:3], None), "lse_b is None: give a tensor"),
        ((states()[0].numpy(), *states()[1:]), "out_a is a numpy.ndarray: give a tensor"),
        ((torch.ones(8), *states()[1:]), r"out_a is \(8,\): give \[..., num_q_heads, v_head_dim\]"),
    ],
)
def test_what_is_no_state(states_: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        hal.merge_attention_states(*states_)


@pytest.mark.parametrize("weight", [torch.ones(32), torch.ones(1), torch.ones(3, 64), torch.ones(64).half(), None])
@pytest.mark.parametrize("name", ["rms_norm", "fused_add_rms_norm", "layer_norm"])
def test_weights_of_a_norm(name: str, weight: Any) -> None:
    """A weight of one element was spread, one of another format was converted, and GPUs read past a short one."""
    x, residual = torch.ones(3, 64), torch.ones(3, 64)
    rows = (x, residual) if name == "fused_add_rms_norm" else (x,)
    norm = hal.get_op(name, hidden_size=64, dtype="float32", device="cpu", kernel="torch")
    rest = (torch.ones(64),) if name == "layer_norm" else ()
    with pytest.raises(ValueError, match="weight is "):
        norm(*rows, weight, *rest)
    assert (residual == 1).all()
    if name == "layer_norm":
        with pytest.raises(ValueError, match="bias is "):
            norm(x, torch.ones(64), weight)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_gradient_that_was_not_asked_for_is_an_error(compiled: bool) -> None:  # requirement R12
    """Whatever the kernel could do, and under compilers too, which hand a node what requires no gradient."""
    bound = hal.get_op("rms_norm", hidden_size=16, dtype="float32", device="cpu", compile=compiled)
    x, weight = torch.ones(2, 16), torch.ones(16, requires_grad=True)
    call = torch.compile(lambda *xs: bound(*xs), backend="aot_eager") if compiled else bound
    with pytest.raises(InputError, match=r"rms_norm: an input requires a gradient.*ask for needs_grad=True"):
        call(x, weight)
    with torch.no_grad():
        call(x, weight)
    asked = hal.get_op("rms_norm", hidden_size=16, dtype="float32", device="cpu", needs_grad=True)
    torch.autograd.backward(asked(x, weight).sum())
    assert weight.grad is not None
