"""Handles of ``get_op`` look at their arguments first: one clear error, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal import _checked
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


ROWS = {"hidden_size": 64}
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
PAGED = {"num_kv_heads": 2, "head_dim": 16, "page_size": 4, "kv_dtype": "float32"}
FIELDS: dict[str, dict[str, Any]] = {
    "rms_norm": ROWS,
    "fused_add_rms_norm": ROWS,
    "layer_norm": ROWS,
    "silu_and_mul": ROWS,
    "gelu_and_mul": ROWS,
    "fp8_quantize": {**ROWS, "fp8_dtype": "float8_e4m3fn", "static": True},
    "rotary_embedding": HEADS,
    "merge_attention_states": {"num_heads": 4, "v_head_dim": 16},
    "kv_cache_write": PAGED,
    "rotary_kv_cache_write": {**PAGED, "num_q_heads": 4},
    "kv_pages_copy": PAGED,
    "kv_pages_gather": PAGED,
}
WITHOUT_OUT = ("merge_attention_states", "kv_cache_write", "kv_pages_copy")


def op_of(name: str, kernel: str, **more: Any) -> hal.BoundOp:
    dtype = {} if name == "kv_pages_copy" else {"dtype": "float32"}
    return hal.get_op(name, device="cpu", kernel=kernel, **{**FIELDS[name], **dtype, **more})


def right(name: str, tokens: int = 3) -> dict[str, Any]:
    """Arguments of so many tokens that fit :data:`FIELDS`, ``out`` aside."""
    cos, sin, caches = torch.rand(8, 8), torch.rand(8, 8), torch.rand(2, 5, 4, 2, 16)
    q, k, v = torch.rand(tokens, 4, 16), *torch.rand(2, tokens, 2, 16)
    x, vectors, slots = torch.rand(tokens, 64), torch.rand(2, 64), torch.arange(tokens)
    cache = {"k_cache": caches[0], "v_cache": caches[1]}
    norm, rotary = {"x": x, "weight": vectors[0]}, {"q": q, "k": k, "cos": cos, "sin": sin, "positions": slots}
    gate = {"x": torch.rand(tokens, 128)}
    table = {"block_table": torch.tensor([[3, 1]]).int(), "cu_seqlens": torch.tensor([0, tokens]).int()}
    return {
        "rms_norm": norm,
        "fused_add_rms_norm": {"x": x, "residual": torch.rand(tokens, 64), "weight": vectors[0]},
        "layer_norm": {**norm, "bias": vectors[1]},
        "silu_and_mul": gate,
        "gelu_and_mul": gate,
        "fp8_quantize": {"x": x, "scale": torch.rand(tokens, 1) + 0.1},
        "rotary_embedding": rotary,
        "merge_attention_states": {"out_a": q, "lse_a": q[..., 0] * 2, "out_b": q + 1, "lse_b": q[..., 1] * 3},
        "kv_cache_write": {"k": k, "v": v, **cache, "slot_mapping": slots},
        "rotary_kv_cache_write": {**rotary, "v": v, **cache, "slot_mapping": slots},
        "kv_pages_copy": {**cache, "source": slots // 3, "target": slots + 1},
        "kv_pages_gather": {**cache, **table, "total": tokens, "longest": tokens},
    }[name]


def whole(x: Tensor) -> bool:
    return not x.is_floating_point()


WRONGS: dict[str, Any] = {
    "on another device": lambda x: x.to("meta"),
    "in another format": lambda x: x.float() if whole(x) else x.double(),
    "wider": lambda x: torch.cat((x, x[..., :1]), -1),
    "of no dim": lambda x: x.flatten()[0],
    "no tensor": lambda x: x.tolist(),
}


def bits(given: dict[str, Any]) -> list[Any]:
    """What arguments and results hold, to compare."""
    return [x.double().tolist() if isinstance(x, Tensor) and not x.is_meta else None for x in given.values()]


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("name", FIELDS)
def test_what_does_not_fit_is_refused_whoever_computes(name: str, kernel: str) -> None:  # requirement C7
    """Each tensor in turn, and nothing is written; before, some kernels spread it, converted it or gave numbers."""
    op = op_of(name, kernel)
    for argument in (n for n, x in right(name).items() if isinstance(x, Tensor)):
        for what, wrong in WRONGS.items():
            if (argument, what) == ("block_table", "wider"):
                continue  # columns past a row's last page may hold anything
            given = right(name)
            given[argument] = wrong(given[argument])
            before = bits(given)
            with pytest.raises(InputError, match=rf"^{name}: \w+ is .*(should be|gives? )"):
                op(**given)
            assert bits(given) == before, (argument, what)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("name", FIELDS)
def test_a_last_dim_with_gaps_is_refused_or_right(name: str, kernel: str) -> None:  # requirement C7
    op = op_of(name, kernel)
    for argument in (n for n, x in right(name).items() if isinstance(x, Tensor) and x.shape[-1] > 1):
        plain = right(name)
        given = {n: x.clone() if isinstance(x, Tensor) else x for n, x in plain.items()}
        given[argument] = torch.stack((given[argument],) * 2, -1).flatten(-2)[..., ::2]
        try:
            found = op(**given)
        except InputError as error:
            assert re.match(rf"{name}: {argument}('s last (stride|dim)| has strides) ", str(error)), error  # noqa: PT017
        else:
            torch.testing.assert_close(found, op(**plain))


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("name", FIELDS)
def test_no_tokens_are_no_work(name: str, kernel: str) -> None:
    given = right(name, tokens=0)
    found = op_of(name, kernel)(**given)
    results = () if found is None else found if isinstance(found, tuple) else (found,)
    assert all(x.shape[0] == 0 for x in results)
    assert all(not x.isnan().any() for x in given.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "token", "block"])
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_no_tokens_have_scales_too(kernel: str, granularity: str, static: bool) -> None:
    """A tensor without elements has no largest one, and a scale all the same."""
    op = op_of("fp8_quantize", kernel, granularity=granularity, static=static)
    scales = {"tensor": torch.ones(1), "token": torch.ones(0, 1), "block": torch.ones(0, 1)}[granularity]
    found, made = op(torch.empty(0, 64), *([scales] if static else []))
    assert (found.shape, made.shape) == ((0, 64), scales.shape)
    assert made.tolist() == scales.tolist() if static else made.tolist() == [2.0**-126] * len(scales)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in WITHOUT_OUT])
def test_an_out_that_does_not_fit_is_refused(name: str, kernel: str) -> None:  # requirement C7
    op, given = op_of(name, kernel), right(name)
    found = op(**right(name))
    good = tuple(x.clone() for x in (found if isinstance(found, tuple) else (found,)))
    for wrong in (*WRONGS.values(), lambda x: x[:1].expand_as(x)):
        outs = wrong(good[0]) if len(good) == 1 else (good[0], wrong(good[1]))
        before = bits(given)
        with pytest.raises(InputError, match=rf"^{name}: out.* (is|has strides) "):
            op(**given, out=outs)
        assert bits(given) == before
    if name == "kv_pages_gather":
        with pytest.raises(InputError, match=r"out\[1\] has strides .* give a contiguous one"):
            op(**given, out=(good[0], torch.zeros(3, 2, 32)[..., :16]))
    if len(good) == 2:
        with pytest.raises(InputError, match=r"out is .* should be a pair of tensors"):
            op(**given, out=good[0])


def test_rotary_tokens_go_together() -> None:  # requirement C7
    op, given = op_of("rotary_embedding", "torch"), right("rotary_embedding")
    for changes, text in (
        ({"positions": torch.tensor([0])}, r"positions is int64 \(1,\) .*int64 or int32 \(3,\) on cpu"),
        ({"k": given["k"][:1]}, r"k is float32 \(1, 2, 16\) .*float32 \(3, 2, 16\)"),
        ({"k": given["k"].repeat(1, 4, 1)}, r"k is float32 \(3, 8, 16\)"),
        ({"cos": given["cos"].half(), "sin": given["sin"].half()}, r"cos is float16 \(8, 8\)"),
        ({"sin": given["sin"][:4]}, r"sin is float32 \(4, 8\) .*float32 \(8, 8\)"),
        ({"positions": torch.zeros(3)}, "positions is float32"),
    ):
        with pytest.raises(InputError, match=f"rotary_embedding: {text}"):
            op(**{**given, **changes})


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul", "fp8_quantize"])
def test_rows_that_fold_into_no_two_dims(name: str) -> None:
    """The contract, so every kernel: Triton's cannot, and torch's did."""
    op = op_of(name, "torch", **({"static": False} if name == "fp8_quantize" else {}))
    x = torch.rand(2, 3, 4, 5, right(name)["x"].shape[-1]).transpose(0, 2)[:, ::2]
    with pytest.raises(InputError, match=r"x has shape .* do not fold into two; pass x.contiguous\(\)"):
        op(**{**right(name), "x": x} if name == "rms_norm" else {"x": x})


def test_every_op_of_one_phase_looks_at_its_arguments() -> None:
    from hal import _plugins

    assert {name for name, op in _plugins.registry().ops.items() if op.phases == ("call",)} == set(FIELDS)


def test_what_looks_like_the_last_call_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # requirement C7
    """Of an accelerator's tensors, as ``meta`` ones are here: each other device, format and shape is looked at anew."""
    looked = []

    def check(*bound: Any) -> Any:
        return lambda *tensors: looked.append(tensors) or ("" if tensors[0].shape[-1] == 8 else "too wide")

    monkeypatch.setattr(_checked, "resolve_target", lambda target: check)
    call = _checked.checked(op_of("rms_norm", "torch").selection, lambda *tensors: len(tensors))
    x, weight = torch.ones(3, 8, device="meta"), torch.ones(8, device="meta")
    assert [call(x, weight), call(x.clone(), weight), call(x.clone(), weight.clone())] == [2, 2, 2]
    assert len(looked) == 1
    for other in (x.half(), x[:2], x.t().contiguous().t(), torch.ones(3, 8)):
        looked.clear()
        assert call(other, weight) == 2
        assert len(looked) == 1
        call(x, weight)
    with pytest.raises(InputError, match="too wide"):
        call(torch.ones(3, 9, device="meta"), weight)
    looked.clear()
    call(*[torch.ones(3, 8)] * 2)
    call(*[torch.ones(3, 8)] * 2)
    assert len(looked) == 2, "numbers on the host may differ"
