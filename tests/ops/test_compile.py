"""``compile=True``: each call is one node of the traced graph, and computes what the bound function does."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal.errors import InputError
from hal_ops.rotary_embedding.tables import rotary_tables

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # inductor's own use

CACHE = {"num_kv_heads": 1, "head_dim": 16, "page_size": 4, "kv_dtype": "float32"}
OPS: dict[str, dict[str, Any]] = {
    "rms_norm": {"hidden_size": 48},
    "fused_add_rms_norm": {"hidden_size": 48},
    "layer_norm": {"hidden_size": 48},
    "silu_and_mul": {"hidden_size": 24},
    "gelu_and_mul": {"hidden_size": 24, "approximate": "tanh"},
    "rotary_embedding": {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 16},
    "fp8_quantize": {"hidden_size": 48, "fp8_dtype": "float8_e4m3fn", "granularity": "block", "block_size": 16},
    "merge_attention_states": {"num_heads": 3, "v_head_dim": 16},
    "kv_cache_write": CACHE,
    "rotary_kv_cache_write": {"num_q_heads": 3, **CACHE},
    "kv_pages_copy": {**CACHE, "dtype": None},
    "kv_pages_gather": CACHE,
}
WITHOUT_OUT = ("merge_attention_states", "kv_cache_write", "kv_pages_copy")


def arguments(name: str, tokens: int = 5) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 48, generator=draw)
    if name == "rotary_embedding":
        return x.view(tokens, 3, 16), x[:, :16].reshape(tokens, 1, 16), *rotary_tables(16, 9), torch.arange(tokens)
    if name in CACHE_ARGUMENTS:
        caches = torch.randn(2, 4, 4, 1, 16, generator=draw).unbind(0)
        return CACHE_ARGUMENTS[name](x.view(tokens, 3, 16), caches)
    extras = {"rms_norm": (48,), "fused_add_rms_norm": ((tokens, 48), 48), "layer_norm": (48, 48)}.get(name, ())
    return x, *(torch.randn(shape, generator=draw) for shape in extras)


def merged(x: Tensor, caches: Any) -> tuple[Any, ...]:
    return x, x[..., 0] + 1, x * 2, x[..., 1] + 2


def written(x: Tensor, caches: Any) -> tuple[Any, ...]:
    return x[:, :1].clone(), x[:, 1:2].clone(), *caches, torch.arange(2, 2 + len(x))


def turned_and_written(x: Tensor, caches: Any) -> tuple[Any, ...]:
    k, v, *others = written(x, caches)
    return x, k, v, *rotary_tables(16, 9), torch.arange(len(x)), *others


def copied(x: Tensor, caches: Any) -> tuple[Any, ...]:
    return *caches, torch.tensor([3, 0]), torch.tensor([1, 2])


def gathered(x: Tensor, caches: Any) -> tuple[Any, ...]:
    lengths = torch.tensor([0, 1, 1 + len(x)], dtype=torch.int32)
    return *caches, torch.tensor([[3, 0], [2, 1]], dtype=torch.int32), lengths, 1 + len(x), len(x)


CACHE_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "merge_attention_states": merged,
    "kv_cache_write": written,
    "rotary_kv_cache_write": turned_and_written,
    "kv_pages_copy": copied,
    "kv_pages_gather": gathered,
}


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)


def flat(value: Any, args: tuple[Tensor, ...]) -> list[Tensor]:
    """Everything that a call made or changed, as bits."""
    results = value if isinstance(value, tuple) else (value,)
    return [x.contiguous().view(torch.uint8) for x in (*results, *args) if isinstance(x, Tensor)]


class Graphs:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.seen.append(graph)
        return graph.forward

    def calls(self) -> list[str]:
        assert len(self.seen) == 1, "the call was not one graph"
        return [str(n.target) for n in self.seen[0].graph.nodes if n.op.startswith("call") and "hal" in str(n.target)]


def bound(name: str, **more: Any) -> tuple[hal.BoundOp, hal.BoundOp]:
    torch._dynamo.reset()
    fields = {n: v for n, v in {"dtype": "float32", **OPS[name], **more}.items() if v is not None}
    return hal.get_op(name, device="cpu", **fields), hal.get_op(name, device="cpu", compile=True, **fields)


@pytest.mark.parametrize("name", OPS)
def test_a_call_is_one_node(name: str) -> None:
    plain, node = bound(name)
    args, again, graphs = fresh(arguments(name)), fresh(arguments(name)), Graphs()
    found = torch.compile(lambda *xs: node(*xs), backend=graphs, fullgraph=True)(*args)
    calls = [n for n in graphs.seen[0].graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
    assert len(calls) == 1
    assert graphs.calls() == [str(calls[0].target)]
    assert f"hal.torch_{name}_" in graphs.calls()[0]
    wanted = plain(*again)
    assert all(map(torch.equal, flat(found, args), flat(wanted, again)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", OPS)
def test_compilers_agree(name: str, backend: str) -> None:
    """Among other operators, and after what is changed in place is read again."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    plain, node = bound(name)

    def around(op: Callable[..., Any]) -> Callable[..., Any]:
        def step(x: Tensor, *others: Any) -> Any:
            first = x if name == "kv_pages_copy" else x * 2
            results = op(first, *others)
            results = results if isinstance(results, tuple) else () if results is None else (results,)
            return (*(y.float() + 1 for y in results), *(y.sum() for y in others if isinstance(y, Tensor)))

        return step

    args, again = fresh(arguments(name)), fresh(arguments(name))
    found = torch.compile(around(node), backend=backend, fullgraph=True)(*args)
    wanted = around(plain)(*again)
    for a, b in zip((*found, *args), (*wanted, *again), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def empties(name: str, args: tuple[Tensor, ...]) -> Any:
    x = args[0]
    if name == "rotary_embedding":
        return torch.empty_like(x), torch.empty_like(args[1])
    if name == "rotary_kv_cache_write":
        return torch.empty_like(x)
    if name == "kv_pages_gather":
        return torch.empty(args[4], 1, 16), torch.empty(args[4], 1, 16)
    if name == "fp8_quantize":
        return torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(len(x), 3)
    return torch.empty(len(x), 24 if name.endswith("and_mul") else 48)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", [name for name in OPS if name not in WITHOUT_OUT])
def test_out_is_filled(name: str, backend: str) -> None:
    plain, node = bound(name)
    args, again = fresh(arguments(name)), fresh(arguments(name))
    mine, theirs = empties(name, args), empties(name, args)
    found = torch.compile(lambda *xs, out: node(*xs, out=out), backend=backend, fullgraph=True)(*args, out=mine)
    plain(*again, out=theirs)
    assert all(map(torch.equal, flat(mine, args), flat(theirs, again)))
    assert all(map(torch.equal, flat(found, args), flat(theirs, again)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_out_may_be_an_input(backend: str) -> None:
    plain, node = bound("rotary_embedding")
    args, again = fresh(arguments("rotary_embedding")), fresh(arguments("rotary_embedding"))

    def step(q: Tensor, k: Tensor, *others: Tensor) -> Tensor:
        node(q, k, *others, out=(q, k))
        return q.sum() + k.sum()

    total = torch.compile(step, backend=backend, fullgraph=True)(*args)
    plain(*again, out=again[:2])
    assert all(map(torch.equal, flat(args, ()), flat(again, ())))
    torch.testing.assert_close(total, again[0].sum() + again[1].sum())


@pytest.mark.parametrize("name", OPS)
def test_shapes_are_known_without_running(name: str) -> None:
    """On the meta device, and with a number of tokens that the compiler does not fix."""
    _, node = bound(name)
    metas = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments(name))
    found, real = node(*metas), node(*fresh(arguments(name)))
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, real)), strict=True):
        if a is b is None:
            continue
        assert (a.shape, a.dtype, a.stride(), a.device.type) == (b.shape, b.dtype, b.stride(), "meta")
    graphs = Graphs()
    step = torch.compile(lambda *xs: node(*xs), backend=graphs, fullgraph=True, dynamic=True)
    for tokens in (5, 6, 7):
        step(*fresh(arguments(name, tokens)))
    assert len(graphs.seen) == 1


@pytest.mark.parametrize("name", OPS)
def test_torch_finds_nothing_wrong_with_the_node(name: str) -> None:
    _, node = bound(name)
    args, graphs = arguments(name), Graphs()
    torch.compile(lambda *xs: node(*xs), backend=graphs, fullgraph=True)(*fresh(args))
    target = next(n.target for n in graphs.seen[0].graph.nodes if "hal" in str(n.target))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(target, fresh(args), test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "silu_and_mul", "rotary_embedding"])
def test_gradients_are_those_of_the_kernel(name: str, backend: str | None) -> None:
    plain, node = bound(name, needs_grad=True)

    def gradients(op: Callable[..., Any]) -> list[Tensor]:
        args = tuple(x.requires_grad_() if x.is_floating_point() else x for x in fresh(arguments(name)))

        def loss(*xs: Tensor) -> Tensor:
            results = op(xs[0] * 2, *xs[1:])
            return torch.stack([y.sin().sum() for y in (results if isinstance(results, tuple) else (results,))]).sum()

        step = torch.compile(loss, backend=backend, fullgraph=True) if backend and op is node else loss
        step(*args).backward()
        return [x.grad for x in args if x.grad is not None]

    found, wanted = gradients(node), gradients(plain)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_result_may_go_unused_in_the_backward() -> None:
    _, node = bound("rotary_embedding", needs_grad=True)
    args = fresh(arguments("rotary_embedding"))
    q = args[0].requires_grad_()
    node(*args)[0].sum().backward()
    assert q.grad is not None
    assert q.grad.ne(0).any()


def test_a_gradient_of_what_works_in_place_is_refused() -> None:
    with pytest.raises(InputError, match="changes an argument in place, and a traced node that does has no gradient"):
        hal.get_op("fused_add_rms_norm", hidden_size=8, dtype="float32", needs_grad=True, compile=True)


def test_an_op_without_a_schema_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    op = hal._plugins.registry().op("rms_norm")
    monkeypatch.setitem(hal._plugins.registry().ops, "rms_norm", dataclasses.replace(op, traced=None))
    with pytest.raises(InputError, match="'rms_norm' cannot be traced"):
        hal.get_op("rms_norm", hidden_size=7, compile=True)


@pytest.mark.parametrize("kv_scale", ["tensor", "head"])
def test_scales_are_keywords_of_the_node(kv_scale: str) -> None:
    fields = {**CACHE, "num_kv_heads": 2, "kv_dtype": "float8_e4m3fn", "kv_scale": kv_scale}
    plain, node = (hal.get_op("kv_cache_write", device="cpu", **fields, compile=c) for c in (False, True))
    torch._dynamo.reset()
    k, slots = torch.randn(5, 2, 16).bfloat16(), torch.arange(5)
    scale = torch.tensor([0.5, 2.0][: 1 + (kv_scale == "head")])
    caches = [torch.zeros(2, 2, 4, 2, 16, dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(2)]

    def step(cache: Tensor) -> Tensor:
        node(k, k, *cache.unbind(0), slots, k_scale=scale, v_scale=scale)
        return cache.view(torch.uint8).sum()

    total = torch.compile(step, backend="aot_eager", fullgraph=True)(caches[0])
    plain(k, k, *caches[1].unbind(0), slots, k_scale=scale, v_scale=scale)
    bits = [x.view(torch.uint8) for x in caches]
    assert torch.equal(*bits)
    assert total == bits[1].sum()


def test_equal_decisions_are_one_node_and_handles_stay_apart() -> None:
    plain, node = bound("rms_norm")
    assert node is hal.get_op("rms_norm", device="cpu", compile=True, dtype="float32", **OPS["rms_norm"])
    assert node is not plain
    hal.reset()
    _, again = bound("rms_norm")
    args = arguments("rms_norm")
    assert torch.equal(again(*args), node(*args))


def test_the_node_costs_less_than_custom_op() -> None:
    """In one run, turn by turn: a library of one's own is ``define`` and ``impl``, and not ``torch.library.custom_op``."""
    plain, node = bound("rms_norm")
    args = arguments("rms_norm", 1)

    @torch.library.custom_op("hal_test::rms_norm", mutates_args=())
    def custom(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = plain.fn(x, weight)
        return found

    best = dict.fromkeys(("plain", "node", "custom"), math.inf)
    for _ in range(30):
        for name, call in (("plain", plain.fn), ("node", node.fn), ("custom", custom)):
            start = time.perf_counter()
            for _ in range(100):
                call(*args)
            best[name] = min(best[name], time.perf_counter() - start)
    assert best["node"] - best["plain"] < 0.7 * (best["custom"] - best["plain"]), best
