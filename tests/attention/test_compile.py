"""``get_attention(compile=True)``: a call is one node, planned ones too, and computes what the plain handle does."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal.errors import InputError, PlanMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # inductor's own use

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 8, "dtype": "float32"}
SERVED: dict[str, Any] = {**BASE, "page_size": 4, "max_q_len": 2, "device": "cpu"}
TABLE = [[5, 1, 4], [0, 3, 2]]


@pytest.fixture(autouse=True)
def no_graphs_kept() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    return str(request.param)


class Graphs:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.seen.append([str(n.target) for n in graph.graph.nodes if n.op.startswith("call")])
        return graph.forward


def handles(**fields: Any) -> tuple[hal.Attention, hal.Attention]:
    given = {**BASE, "device": "cpu", **fields}
    return hal.get_attention(**given), hal.get_attention(**given, compile=True)


def tensors(*lead: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*lead, *tail, generator=draw) for tail in ((4, 16), (2, 16), (2, 8)))
    return q, k, v


def close(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


RAGGED = {"cu_seqlens_q": torch.tensor([0, 3, 7]).int(), "cu_seqlens_k": torch.tensor([0, 3, 7]).int()}


def test_a_call_is_one_node() -> None:
    plain, node = handles(phases="prefill")
    q, k, v = tensors(2, 7)
    graphs = Graphs()
    found = torch.compile(lambda *xs: node(*xs), backend=graphs, fullgraph=True)(q, k, v)
    assert torch.equal(found, plain(q, k, v))
    assert [len(calls) for calls in graphs.seen] == [1]
    assert graphs.seen[0][0].startswith("hal.attention_")
    assert torch.equal(node(q, k, v), found), "outside of compilers too"


@pytest.mark.parametrize("fields", [{}, {"window": 3, "sinks": True}, {"alibi": True}], ids=["plain", "sinks", "alibi"])
def test_fresh_calls(fields: dict[str, Any], backend: str) -> None:
    plain, node = handles(phases="prefill", return_lse=True, **fields)
    extras: dict[str, Any] = {"sinks": torch.randn(4)} if "sinks" in fields else {}
    extras |= {"alibi_slopes": torch.rand(4)} if "alibi" in fields else {}

    def step(attn: hal.Attention, q: Tensor, k: Tensor, v: Tensor) -> Any:
        dense = attn(q[None] * 2, k[None], v[None], **extras)
        ragged, lse = attn(q, k, v, **RAGGED, max_seqlen_q=4, max_seqlen_k=4, return_lse=True, **extras)
        return dense + 1, ragged * 2, lse + 1

    args = tensors(7)
    found = torch.compile(lambda *xs: step(node, *xs), backend=backend, fullgraph=True)(*args)
    close(found, step(plain, *args))


@pytest.mark.parametrize("length", [5, 6, 9])
def test_lengths_need_no_new_graph(length: int) -> None:
    _, node = handles(phases="prefill")
    graphs = Graphs()
    step = torch.compile(lambda *xs: node(*xs), backend=graphs, fullgraph=True, dynamic=True)
    for n in (length, length + 1, length + 2):
        step(*tensors(2, n))
    assert len(graphs.seen) == 1


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_gradients_are_those_of_the_kernel(ragged: bool, sinks: bool, backend: str) -> None:
    plain, node = handles(phases="prefill", needs_grad=True, sinks=sinks)
    lengths: dict[str, Any] = RAGGED if ragged else {}

    def gradients(attn: hal.Attention, compiled: bool) -> list[Tensor]:
        given = [x.requires_grad_() for x in tensors(7)]
        if sinks:
            given.append(torch.linspace(-1, 1, 4).requires_grad_())

        def loss(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
            extras: dict[str, Any] = {"sinks": more[0]} if more else {}
            three = (q * 2, k, v) if ragged else (q[None] * 2, k[None], v[None])
            return torch.as_tensor(attn(*three, **lengths, **extras)).sin().sum()

        step: Callable[..., Any] = torch.compile(loss, backend=backend, fullgraph=True) if compiled else loss
        torch.autograd.backward(step(*given))
        assert all(x.grad is not None for x in given)
        return [x.grad for x in given if x.grad is not None]

    right = gradients(plain, compiled=False)
    for compiled in (False, True):
        close(gradients(node, compiled), right)
    assert all(x.ne(0).any() for x in right)


def test_the_lse_has_a_gradient_too() -> None:
    plain, node = handles(phases="prefill", needs_grad=True, return_lse=True)
    found = []
    for attn in (plain, node):
        q, k, v = (x.requires_grad_() for x in tensors(2, 5))
        out, lse = attn(q, k, v, return_lse=True)
        torch.autograd.backward(out.sin().sum() + lse.cos().sum())
        found.append([q.grad, k.grad, v.grad])
    close(found[1], found[0])


def test_a_torch_that_cannot_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded")
    hal.reset()
    with pytest.raises(InputError, match="does not let autograd record inside an op"):
        hal.get_attention(**BASE, phases="prefill", needs_grad=True, device="cpu", compile=True)


def test_a_backward_from_another_backward() -> None:
    """The engine calls from its own threads, and calls may stand inside each other: nothing waits for a thread."""
    _, node = handles(phases="prefill", needs_grad=True)
    three = [x.requires_grad_() for x in tensors(1, 5)]

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            with torch.enable_grad():
                again = [x.detach().requires_grad_() for x in three]
                torch.autograd.backward(node(*again).sum())
            assert again[0].grad is not None
            return grad

    torch.autograd.backward(Inner.apply(node(*three)).sum())
    assert all(x.grad is not None for x in three)
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU)


def test_needs_grad_lands_on_kernels_with_a_backward() -> None:  # requirement R12
    """Whatever is registered, on each simulated device: what is chosen declares the field."""
    kernels = hal._plugins.registry().kernels
    for device in ("cpu:x86_64", "nvidia:sm_80", "nvidia:sm_90", "nvidia:sm_100", "rocm:gfx942", "musa:mp_31"):
        for dtype in ("bfloat16", "float32"):
            with hal.simulate(device, libraries={"torch": "2.11.0", "triton": "3.6.0"}):
                request = hal._front.AttentionRequest(**{**BASE, "dtype": dtype}, needs_grad=True)
                chosen = hal.select(request).kernels()
            assert set(chosen) == {"prefill"}
            assert "needs_grad" in kernels[str(chosen["prefill"])].fields
    assert "needs_grad" not in kernels["triton.prefill"].fields
    with hal.simulate("nvidia:sm_90", libraries={"torch": "2.11.0", "triton": "3.6.0"}):
        forced = hal.select(request, kernel="triton.prefill")
    assert not forced.complete
    triton = next(c for c in forced.choices["prefill"].candidates if c.kernel.name == "triton.prefill")
    assert any("needs_grad" in str(reason) for reason in triton.reasons)


def serve(attn: hal.Attention, call: Callable[..., Any], **cache_fields: Any) -> tuple[list[Tensor], hal.KVCache]:
    """Prefill, extend, two decode steps and one call over what is cached: all phases, a plan each."""
    cache = attn.allocate_kv_cache(6, **cache_fields)
    outs = []
    for seed, (q_lens, kv_lens) in enumerate(
        (((5, 3), (5, 3)), ((3, 4), (8, 7)), ((1, 1), (9, 8)), ((2, 2), (11, 10)))
    ):
        plan = attn.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=TABLE)
        q, k, v = (x.to(attn._dtype) for x in tensors(sum(q_lens), seed=seed))
        outs.append(call(q, k, v, cache, plan))
    outs.append(call(q * 2, None, None, cache, plan))
    return outs, cache


@pytest.mark.parametrize("fields", [{}, {"kv_layout": "HND"}, {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn"}])
def test_planned_calls(fields: dict[str, Any], backend: str) -> None:  # requirement E12
    given = {**SERVED, **fields}
    plain, node = hal.get_attention(**given), hal.get_attention(**given, compile=True)
    scales = {"k_scale": 0.5, "v_scale": 2.0} if "kv_dtype" in fields else {}

    def step(attn: hal.Attention) -> Callable[..., Any]:
        return lambda q, k, v, cache, plan: attn(q * 1, k, v, cache=cache, plan=plan) + 1

    compiled = torch.compile(step(node), backend=backend, fullgraph=True)
    found, cache = serve(node, compiled, **scales)
    right, other = serve(plain, step(plain), **scales)
    close(found, right)
    for x, y in ((cache.k, other.k), (cache.v, other.v)):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_another_plan_compiles_nothing_anew() -> None:
    node = hal.get_attention(**SERVED, compile=True)
    cache, graphs = node.allocate_kv_cache(6), Graphs()
    step = torch.compile(lambda q, k, v, plan: node(q, k, v, cache=cache, plan=plan), backend=graphs, fullgraph=True)
    for length in range(1, 8):
        plan = node.plan(q_lens=[1, 1], kv_lens=[length, length + 1], block_table=TABLE)
        step(*tensors(2), plan)
    assert len(graphs.seen) == 1
    plan = node.plan(q_lens=[1, 1], kv_lens=[8, 9], block_table=TABLE, max_batch=4)
    step(*tensors(2), plan)
    step(*tensors(2), plan.update(q_lens=[1, 1], kv_lens=[9, 10], block_table=TABLE))
    assert len(graphs.seen) == 1


def test_several_layers_share_a_plan(backend: str) -> None:
    """Two calls in one graph; the second layer's cache is a view beside the first's."""
    plain, node = hal.get_attention(**{**SERVED, "v_head_dim": 16}), None
    node = hal.get_attention(**{**SERVED, "v_head_dim": 16}, compile=True)
    results = []
    for attn, compiled in ((plain, False), (node, True)):
        both = torch.zeros(6, 4, 4, 2, 16).unbind(1)
        caches = [hal.KVCache(*both[i : i + 2], layout="NHD") for i in (0, 2)]
        plan = attn.plan(q_lens=[5, 3], kv_lens=[5, 3], block_table=TABLE)

        def model(q: Tensor, k: Tensor, attn: Any = attn, caches: Any = caches, plan: Any = plan) -> Tensor:
            for cache in caches:
                q = attn(q, k, k, cache=cache, plan=plan) + q
            return q

        run: Callable[..., Any] = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        q, k, _ = tensors(8)
        results.append((run(q, k), *both))
    close(results[1], results[0])


def test_mistakes_are_named_as_by_the_plain_handle() -> None:
    node = hal.get_attention(**SERVED, compile=True)
    other = hal.get_attention(**{**SERVED, "window": 3}, compile=True)
    q, k, v = tensors(2)
    cache = node.allocate_kv_cache(6)
    plan = node.plan(q_lens=[1, 1], kv_lens=[1, 1], block_table=TABLE)
    with pytest.raises(PlanMismatchError, match="the plan was made by"):
        other(q, k, v, cache=cache, plan=plan)
    with pytest.raises(InputError, match="q has 1 tokens, the plan 2"):
        node(q[:1], k[:1], v[:1], cache=cache, plan=plan)
    with pytest.raises(InputError, match="cache is missing"):
        node(q, k, v, plan=plan)
    with pytest.raises(InputError, match="v is missing: give both"):
        node(q, k, cache=cache, plan=plan)
    with pytest.raises(InputError, match="k and v are missing"):
        node(q)
    turned = hal.KVCache(*(x.transpose(1, 2).contiguous() for x in (cache.k, cache.v)), layout="HND")
    with pytest.raises(InputError, match="layout is HND, not NHD"):
        node(q, k, v, cache=turned, plan=plan)
    with pytest.raises(InputError, match="page_size is 2, not 4"):
        node(q, k, v, cache=hal.KVCache(turned.k, turned.v, layout="NHD"), plan=plan)
    with pytest.raises(InputError, match=r"k is \(2, 2, 8\)"):
        node(q, v, v, cache=cache, plan=plan)
    with pytest.raises(InputError, match="sinks is given"):
        node(q[None], k[None], v[None], sinks=torch.zeros(4))


def test_a_plan_that_is_gone_is_named() -> None:
    node = hal.get_attention(**SERVED, compile=True)
    q, k, v = tensors(2)
    cache = node.allocate_kv_cache(6)
    token = node.plan(q_lens=[1, 1], kv_lens=[1, 1], block_table=TABLE)._token
    gc.collect()
    with pytest.raises(InputError, match="the plan of this call is gone"):
        node._step_node(q, k, v, cache.k, cache.v, None, None, token, None, None)  # type: ignore[attr-defined]


def test_torch_finds_nothing_wrong_with_the_nodes() -> None:
    node: Any = hal.get_attention(**SERVED, compile=True)
    q, k, v = tensors(2)
    cache = node.allocate_kv_cache(6)
    plan = node.plan(q_lens=[1, 1], kv_lens=[1, 1], block_table=TABLE)
    rest = (cache.k, cache.v, None, None, plan._token, None, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    lengths = (None, None, None, None, None, None)
    for target, args in (
        (node._step_node, (q, k, v, *rest)),
        (node._read_node, (q, *rest)),
        (node._fresh_node, (q[None], k[None], v[None], *lengths)),
        (node._fresh_node, (*tensors(7), RAGGED["cu_seqlens_q"], RAGGED["cu_seqlens_k"], 4, 4, None, None)),
    ):
        assert set(torch.library.opcheck(target, args, test_utils=checks).values()) == {"SUCCESS"}


def test_handles_are_kept_apart() -> None:
    given = {**BASE, "phases": "prefill", "device": "cpu"}
    assert hal.get_attention(**given, compile=True) is hal.get_attention(**given, compile=True)
    assert hal.get_attention(**given, compile=True) is not hal.get_attention(**given)
    layers = hal.get_attentions([SERVED_FIELDS, {**SERVED_FIELDS, "window": 3}], device="cpu", compile=True)
    assert all(type(layer).__name__ == "TracedAttention" for layer in layers)


SERVED_FIELDS = {name: value for name, value in SERVED.items() if name != "device"}
