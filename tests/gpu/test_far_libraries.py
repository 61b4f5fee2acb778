"""On hardware: tensors that lie over more than 2**32 elements, through every kernel that can run here.

Kernels multiply rows by strides in 32 bits here and there. What they get wrong that way is silent: other rows are read, and
written. So far rows are right, or refused; of most of the memory nothing is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_kernel import BASE, faults, serving
from torch import Tensor

import hal
from hal import _plugins
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case as make_latent_case

pytestmark = pytest.mark.gpu

SPAN = (1 << 32) + (1 << 28)
"""Elements from the first row of a tensor to the last."""
LENGTHS: dict[str, Any] = {
    "ragged": ((1, 1), (3, 3), (5, 5), (4, 4)),
    "one sequence": ((300, 300),),
    "dense": ((4, 4),) * 5,
    "extend": ((3, 40), (5, 20), (1, 90), (1, 33), (1, 50)),
    "decode": ((1, 40), (1, 20), (1, 90), (1, 1), (1, 33)),
}
"""The last row's queries see several keys. One sequence lies as far as the others together."""

Far = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


@pytest.fixture
def far(device: hal.Device) -> Iterator[Far]:
    """Moves a tensor: the same values, the first dim's indices far apart. All share one memory."""
    memory = [torch.empty(2 * (SPAN + (1 << 24)), dtype=torch.uint8, device=device.torch_device())]
    taken = [0]

    def moved(x: Tensor) -> Tensor:
        stride = SPAN // max(x.shape[0] - 1, 1) // 64 * 64
        inner = torch.empty(x.shape[1:], device="meta")
        found = memory[0][taken[0] :].view(x.dtype).as_strided(x.shape, (stride, *inner.stride()))
        taken[0] += -(-inner.numel() * x.itemsize // 256) * 256
        return found.copy_(x)

    yield moved
    memory.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("form", [*LENGTHS, "extend, FP8", "decode, FP8"])
@pytest.mark.parametrize("what", ["q", "keys and values"])
def test_attention(form: str, what: str, far: Far, device: hal.Device) -> None:  # requirement P24
    form, _, fp8 = form.partition(", ")
    phase = form if form in ("extend", "decode") else "prefill"
    cache = {"kv_dtype": "float8_e4m3fn"} if fp8 else {}
    ragged = {"form": "dense" if form == "dense" else "ragged"} if phase == "prefill" else {}

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        case = make_case(asked, phase, device=device.torch_device(), lengths=LENGTHS[form], **ragged)
        args = tuple(far(x) if is_far(n, x) else x for n, x in enumerate(case.args))
        return problems(dataclasses.replace(case, args=args), kernel, asked, device)

    def is_far(place: int, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 2 and (place == 0) == (what == "q")

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, "page_size": 16, "kv_layout": "NHD", **cache, **more}, phases=phase)

    served = list(serving("attention", phase, request, device))
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(found)


@pytest.mark.parametrize("what", ["q", "latents"])
def test_latent_attention(what: str, far: Far, device: hal.Device) -> None:  # requirement P24
    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        case = make_latent_case(asked, "decode", device=device.torch_device(), lengths=LENGTHS["decode"])
        q, latents, *rest = case.args
        args = (far(q), latents, *rest) if what == "q" else (q, far(latents), *rest)
        return problems(dataclasses.replace(case, args=args), kernel, asked, device)

    def request(more: dict[str, Any]) -> Request:
        return MlaAttentionRequest(num_q_heads=16, page_size=64, phases=("decode",))

    served = list(serving("mla_attention", "decode", request, device))
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(found)


def problems(case: Any, kernel: hal.Kernel, asked: Request, device: hal.Device) -> list[str]:
    implementation = resolve_target(kernel.target)(asked, device)
    return [comparison.report() for comparison in case.check(implementation) if not comparison.ok]


ROWS: dict[str, dict[str, Any]] = {
    "rms_norm": {"hidden_size": 128},
    "rms_norm, plus one": {"hidden_size": 128, "weight_offset": 1.0},
    "fused_add_rms_norm": {"hidden_size": 128},
    "layer_norm": {"hidden_size": 128, "weight_dtype": "float32"},
    "silu_and_mul": {"hidden_size": 64},
    "rotary_embedding": {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    "kv_cache_write": {"num_kv_heads": 2, "head_dim": 64},
    "merge_attention_states": {"num_heads": 4, "v_head_dim": 64},
}


def arguments(op: str, place: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What may lie far apart, and the rest."""
    torch.manual_seed(0)
    rows = [torch.randn(20, 128, device=place).bfloat16() for _ in range(2)]
    heads = [torch.randn(20, 4, 64, device=place).bfloat16() for _ in range(2)]
    weight = torch.rand(128, device=place)
    if op == "rotary_embedding":
        tables = [torch.rand(32, 32, device=place) for _ in range(2)]
        return [heads[0], heads[1][:, :2].contiguous()], [*tables, torch.arange(20, device=place)]
    if op == "kv_cache_write":
        caches = [torch.zeros(6, 16, 2, 64, device=place).bfloat16() for _ in range(2)]
        return [*(x[:, :2].contiguous() for x in heads), *caches], [torch.arange(20, device=place) * 4]
    if op == "merge_attention_states":
        return heads, [torch.randn(20, 4, device=place) for _ in range(2)]
    rest = {"rms_norm": [weight.bfloat16()], "fused_add_rms_norm": [weight.bfloat16()], "layer_norm": [weight, weight]}
    return rows if op == "fused_add_rms_norm" else rows[:1], rest.get(op, [])


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str, far: Far, device: hal.Device) -> None:  # requirement P24
    op = case.partition(",")[0]
    request = _plugins.registry().op(op).request(**ROWS[case])

    def check(kernel: hal.Kernel) -> list[str]:
        apart, rest = arguments(op, device.torch_device())
        right = called(kernel, [x.clone() for x in apart], rest)
        into = [far(torch.zeros_like(right[0]))] if op in ("rms_norm", "layer_norm", "silu_and_mul") else []
        found = called(kernel, [far(x) for x in apart], rest, *into)
        return [] if all(torch.allclose(a, b, atol=2e-2) for a, b in zip(found, right, strict=True)) else ["WRONG"]

    def called(kernel: hal.Kernel, apart: list[Tensor], rest: list[Tensor], *into: Tensor) -> list[Tensor]:
        """The results, those written into tensors of the call among them."""
        call = resolve_target(kernel.target)(request, device)
        keywords = {"out": into[0]} if into else {"out": apart[0]} if op == "fused_add_rms_norm" else {}
        keywords = {"out": tuple(apart)} if op == "rotary_embedding" else keywords
        states = [apart[0], rest[0], apart[1], rest[1]] if op == "merge_attention_states" else [*apart, *rest]
        result = call(*states, **keywords)
        written = {"kv_cache_write": apart[2:], "fused_add_rms_norm": apart}.get(op, [])
        return [*(result if isinstance(result, tuple) else [] if result is None else [result]), *written]

    served = [kernel for kernel, _ in serving(op, "call", lambda more: request, device)]
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k: check(k)) for k in served])), "\n".join(found)
