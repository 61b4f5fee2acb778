"""flashinfer's 32-bit products of rows and strides: rows in parts that it reaches, and queries that it does not, refused.

The limits are made small here; on hardware ``tests/gpu/test_far_libraries.py`` goes past the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flashinfer, hardware, library, nvidia, signatures
from emulated.library import Installed
from torch import Tensor

import hal
from hal import _plugins
from hal._plan import make_step
from hal_nvidia import (
    _flashinfer_ops,
    _flashinfer_reads,
    _flashinfer_states,
    flashinfer_kernels,
    flashinfer_mla_kernels,
    flashinfer_op_kernels,
)
from hal_ops import resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

ROWS = {k.op: k for k in flashinfer_op_kernels.KERNELS}
KERNELS = {k.name: k for k in (*flashinfer_kernels.KERNELS, *flashinfer_mla_kernels.KERNELS)}
FA2 = [*(name for name in KERNELS if name.startswith("flashinfer_fa2")), "flashinfer_sink.decode"]
CPU = torch.device("cpu")
REACH = 1000


@pytest.fixture
def held() -> Iterator[Installed]:
    version = signatures.versions(flashinfer.LIBRARY)[-1]
    functions = flashinfer.emulations(version, "sm_90")
    with hal.simulate(libraries={}), library.installed(flashinfer.LIBRARY, version, functions) as held:
        yield held


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Rows are given to the library over less than ``REACH`` elements."""
    for module in (_flashinfer_reads, _flashinfer_ops, _flashinfer_states):
        monkeypatch.setattr(module, "FAR", REACH)
    with nvidia.running_on("sm_90", "flashinfer") as held:
        assert isinstance(held, Installed)
        yield held


def spaced(*shape: int, gap: int) -> Tensor:
    return torch.randn(*shape[:-1], shape[-1] + gap).bfloat16()[..., : shape[-1]]


def both(op: str, **fields: Any) -> tuple[Any, Any]:
    request = _plugins.registry().op(op).request(**fields)
    reference = resolve_target(str(_plugins.registry().op(op).reference["call"]))
    return hardware.build(ROWS[op], request), reference(request, "cpu")


def within_reach(held: Installed, *names: str) -> int:
    """How many calls there were; what each is given lies over less than the limit."""
    for call in held.calls:
        for x in (call.arguments.get(name) for name in names):
            if x is None:
                continue
            assert sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) < REACH
    return len(held.calls)


@pytest.mark.parametrize("into", ["returned", "out", "out of odd rows"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(20, 64), (3, 5, 64), (1, 64)])
def test_far_rows_are_normalised_in_parts(shape: tuple[int, ...], offset: float, into: str, short: Installed) -> None:
    # requirement P24
    torch.manual_seed(0)
    call, right = both("rms_norm", hidden_size=64, weight_offset=offset)
    x, weight = spaced(*shape, gap=64), torch.randn(64).bfloat16()
    out = {"out": spaced(*shape, gap=128), "out of odd rows": spaced(*shape, gap=3)}.get(into)
    found = call(x, weight, **({} if out is None else {"out": out}))
    assert out is None or found is out
    torch.testing.assert_close(found, right(x, weight), atol=2e-2, rtol=2e-2)
    assert (within_reach(short, "input", "out") > 1) == (shape != (1, 64))


@pytest.mark.parametrize("shape", [(20, 64), (3, 5, 64)])
@pytest.mark.parametrize("inplace", [True, False])
def test_far_rows_are_added_in_parts(shape: tuple[int, ...], inplace: bool, short: Installed) -> None:
    # requirement P24
    torch.manual_seed(0)
    call, right = both("fused_add_rms_norm", hidden_size=64)
    x, residual, weight = spaced(*shape, gap=64), spaced(*shape, gap=192), torch.randn(64).bfloat16()
    total = residual.clone()
    wanted = right(x.clone(), total, weight)
    found = call(x, residual, weight, **({"out": x} if inplace else {}))
    assert (found is x) == inplace
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    assert torch.equal(residual, total)
    assert within_reach(short, "input", "residual") > 1


@pytest.mark.parametrize("given", [False, True])
def test_many_rows_are_normalised_about_their_mean_in_parts(given: bool, short: Installed) -> None:  # requirement P24
    torch.manual_seed(0)
    call, right = both("layer_norm", hidden_size=64, weight_dtype="float32")
    x, weight, bias = torch.randn(40, 64).bfloat16(), torch.randn(64), torch.randn(64)
    out = torch.empty_like(x) if given else None
    found = call(x, weight, bias, out=out)
    torch.testing.assert_close(found, right(x, weight, bias), atol=2e-2, rtol=2e-2)
    assert within_reach(short, "input") > 1


def test_many_states_are_merged_in_parts(short: Installed) -> None:  # requirement B14, P24
    torch.manual_seed(0)
    call, right = both("merge_attention_states", num_heads=2, v_head_dim=64)
    states = [torch.randn(3, 11, 2, 64).bfloat16() if n % 2 == 0 else torch.randn(3, 11, 2) for n in range(4)]
    for mine, wanted in zip(call(*states), right(*states), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-2, rtol=2e-2)
    assert within_reach(short, "v_a", "v_b") > 1


def attention(name: str) -> tuple[Any, list[Any]]:
    """An implementation, and a call's arguments for one row of two queries, or of one where there may be no more."""
    kernel = KERNELS[name]
    if kernel.op == "mla_attention":
        latent = MlaAttentionRequest(num_q_heads=16, page_size=16, phases=("decode",))
        step = make_step([1], [9], torch.zeros(1, 1, dtype=torch.int32), 16, CPU)
        made = hardware.build(kernel, latent)
        return made, [torch.randn(1, 16, 576).bfloat16(), torch.randn(2, 16, 576).bfloat16(), step, made.plan(step)]
    fields = {"sinks": True} if "sink" in name else {}
    request = AttentionRequest(
        num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD", phases=(kernel.phase,), **fields
    )
    made, count = hardware.build(kernel, request), 1 if kernel.phase == "decode" else 2
    q, k, v = (torch.randn(count, heads, 64).bfloat16() for heads in (4, 2, 2))
    if kernel.phase == "prefill":
        return made, [q, k, v]
    caches = torch.randn(2, 2, 16, 2, 64).bfloat16()
    step = make_step([count], [9], torch.zeros(1, 1, dtype=torch.int32), 16, CPU)
    return made, [q, *caches, step, made.plan(step)]


def called(name: str, made: Any, arguments: list[Any]) -> Any:
    if KERNELS[name].phase == "prefill":
        lengths = torch.tensor([0, 2], dtype=torch.int32)
        return made(*arguments, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    return made(*arguments, **({"sinks": torch.zeros(4)} if "sink" in name else {}))


@pytest.mark.parametrize("name", FA2)
def test_far_queries_are_refused_before_anything_is_launched(
    name: str, held: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P24, C7
    made, arguments = attention(name)
    called(name, made, arguments)
    before = len(held.calls)
    q = arguments[0]
    arguments[0] = torch.empty(0, dtype=q.dtype, device="meta").as_strided(q.shape, (*q.stride()[:-2], 1 << 32, 1))
    with pytest.raises(ValueError, match=r"q \(.*\) with strides .* in 32 bits: give fewer tokens"):
        called(name, made, arguments)
    assert [c.function for c in held.calls[before:] if not c.function.endswith("plan")] == []


@pytest.mark.parametrize("which", [0, 1, 2])
def test_far_dense_tensors_are_refused_where_they_are_bound(which: int, held: Installed) -> None:  # requirement P24
    made, arguments = attention("flashinfer_fa2.prefill")
    arguments = [x.unsqueeze(0) for x in arguments]
    assert made.for_dense(*arguments)(*arguments).shape == (1, 2, 4, 64)
    x = arguments[which]
    arguments[which] = torch.empty(0, dtype=x.dtype, device="meta").as_strided(x.shape, (0, 1 << 32, 64, 1))
    with pytest.raises(ValueError, match="in 32 bits"):
        made.for_dense(*arguments)


@pytest.mark.parametrize("name", [name for name in FA2 if KERNELS[name].op == "attention"])
def test_a_step_of_too_many_tokens_is_refused_by_its_plan(
    name: str, held: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P24
    made, _ = attention(name)
    monkeypatch.setattr(_flashinfer_reads, "_FAR_QUERIES", 20 * 4 * 64)
    lens = [1] * 20 if KERNELS[name].phase == "decode" else [20]
    step = make_step(lens, lens, torch.zeros(len(lens), 2, dtype=torch.int32), 16, CPU)
    with pytest.raises(ValueError, match="20 tokens of 4 heads of 64 have 5120 elements"):
        made.for_step(step) if KERNELS[name].phase == "prefill" else made.plan(step)


def test_many_keys_of_few_queries_are_refused(held: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P24
    made, _ = attention("flashinfer_fa2.prefill")
    monkeypatch.setattr(_flashinfer_reads, "_FAR_QUERIES", 20 * 2 * 64)
    q, k, v = (torch.randn(count, heads, 64).bfloat16() for count, heads in ((2, 4), (20, 2), (20, 2)))
    lengths = [torch.tensor([0, count], dtype=torch.int32) for count in (2, 20)]
    before = len(held.calls)
    with pytest.raises(ValueError, match="20 tokens of 2 heads of 64 have 2560"):
        made(q, k, v, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1])
    assert len(held.calls) == before


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_layer_s_tensors_are_looked_at(which: int, held: Installed) -> None:  # requirement P24, C4
    """Those of one layer are near, of the next q, k or v lies far: it is refused, though the others are alike."""
    made, _ = attention("flashinfer_fa2.prefill")
    layer = made.for_step(make_step([2], [2], torch.zeros(1, 1, dtype=torch.int32), 16, CPU))
    three = [spaced(2, heads, 64, gap=64) for heads in (4, 2, 2)]
    layer(*three)
    before = len(held.calls)
    x = three[which]
    three[which] = torch.empty(0, dtype=x.dtype, device="meta").as_strided(x.shape, (1 << 32, 128, 1))
    with pytest.raises(ValueError, match=rf"{'qkv'[which]} \(.*\) with strides .* in 32 bits"):
        layer(*three)
    assert len(held.calls) == before


@pytest.mark.parametrize("name", [name for name in FA2 if KERNELS[name].phase != "prefill"])
def test_queries_of_a_longer_step_are_looked_at_anew(
    name: str, held: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P24, C4
    """A plan that is updated has more of them, over strides that it has seen."""
    made, (q, *caches, _, _) = attention(name)
    count = len(q)
    q = torch.randn(20, q.shape[1], 4 * q.shape[2]).bfloat16()[..., : q.shape[2]]
    monkeypatch.setattr(_flashinfer_reads, "_FAR_QUERIES", 18 * q.stride(0))
    lens = [1] * 20 if KERNELS[name].phase == "decode" else [20]
    steps = [make_step(n, n, torch.zeros(len(n), 2, dtype=torch.int32), 16, CPU) for n in ([count], lens)]
    payload = made.plan(steps[0])
    called(name, made, [q[:count], *caches, steps[0], payload])
    payload = made.update(steps[1], payload)
    with pytest.raises(ValueError, match=r"q .* with strides .* in 32 bits: give fewer tokens"):
        called(name, made, [q, *caches, steps[1], payload])
