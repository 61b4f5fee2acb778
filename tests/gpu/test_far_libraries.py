"""On hardware: tensors that lie over more than 2**32 elements, through every kernel that can run here.

Kernels multiply rows by strides in 32 bits here and there. What they get wrong that way is silent: other rows are read, and
written. So far rows are right, or refused; of most of the memory nothing is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal import _plugins
from hal.testing._verify import circumstances, refusals
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case as make_latent_case

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SPAN = (1 << 32) + (1 << 28)
"""Elements from the first row of a tensor to the last."""
BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
WANTED: dict[str, dict[str, Any]] = {
    "fa2": {"page_size": 256},
    "flashinfer_sink": {"sinks": True, "head_dim": 64},
    "trtllm_gen": {"kv_layout": "HND"},
    "flashinfer_cudnn": {"kv_layout": "HND"},
}
"""What libraries ask for that do not serve the others' request."""
LENGTHS: dict[str, Any] = {
    "ragged": ((1, 1), (3, 3), (5, 5), (4, 4)),
    "dense": ((4, 4),) * 5,
    "extend": ((3, 40), (5, 20), (1, 90), (1, 33), (1, 50)),
    "decode": ((1, 40), (1, 20), (1, 90), (1, 1), (1, 33)),
}
"""The last row's queries see several keys."""
REFUSED = "in 32 bits"

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


def serving(op: str, phase: str, request: Callable[[dict[str, Any]], Request], device: hal.Device) -> Iterator[Any]:
    """(kernel, a request that it serves) of all kernels that can run here."""
    around = circumstances(device)
    for kernel in _plugins.registry().kernels.values():
        if (kernel.op, kernel.phase) == (op, phase):
            asked = request(WANTED.get(kernel.library, {}))
            if not refusals(kernel, asked, around):
                yield kernel, asked


def faults(checks: Sequence[tuple[str, Callable[[], list[str]]]]) -> list[str]:
    """What is wrong, of all; what is refused for its distance is not."""
    found = []
    for name, check in checks:
        try:
            found += [f"{name}: {fault}" for fault in check()]
            torch.cuda.synchronize()
        except ValueError as error:
            found += [] if REFUSED in str(error) else [f"{name}: {error}"]
    return found


@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("what", ["q", "keys and values"])
def test_attention(form: str, what: str, far: Far, device: hal.Device) -> None:  # requirement D8
    phase = form if form in ("extend", "decode") else "prefill"
    ragged = {"form": form} if phase == "prefill" else {}

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        case = make_case(asked, phase, device=device.torch_device(), lengths=LENGTHS[form], **ragged)
        args = tuple(far(x) if is_far(n, x) else x for n, x in enumerate(case.args))
        return problems(dataclasses.replace(case, args=args), kernel, asked, device)

    def is_far(place: int, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 2 and (place == 0) == (what == "q")

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, "page_size": 16, "kv_layout": "NHD", **more}, phases=phase)

    served = list(serving("attention", phase, request, device))
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(found)


@pytest.mark.parametrize("what", ["q", "latents"])
def test_latent_attention(what: str, far: Far, device: hal.Device) -> None:  # requirement D8
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
    "silu_and_mul": {"hidden_size": 128},
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
def test_rows(case: str, far: Far, device: hal.Device) -> None:  # requirement D8
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


def test_rows_one_behind_the_other(device: hal.Device) -> None:  # requirement D8
    """Truly that many elements: the last rows are those of a small call, and no other row is changed."""
    place, hidden = device.torch_device(), 16384
    x = torch.zeros((1 << 18) + 64, hidden, dtype=torch.bfloat16, device=place)
    out, weight = torch.empty_like(x), torch.rand(hidden, device=place).bfloat16()
    request = _plugins.registry().op("rms_norm").request(hidden_size=hidden)

    def check(kernel: hal.Kernel) -> list[str]:
        x[-64:] = torch.randn(64, hidden, device=place).bfloat16()
        call = resolve_target(kernel.target)(request, device)
        call(x, weight, out=out.fill_(torch.nan))
        same = torch.allclose(out[-64:], call(x[-64:].clone(), weight), atol=2e-2)
        return [] if same and not out[:-64].any() else ["WRONG"]

    served = [kernel for kernel, _ in serving("rms_norm", "call", lambda more: request, device)]
    assert not (found := faults([(k.name, lambda k=k: check(k)) for k in served])), "\n".join(found)


def test_tokens_one_behind_the_other(device: hal.Device) -> None:  # requirement D8
    """The same of a ragged prefill, whose outputs are as many."""
    place, heads, dim, length = device.torch_device(), 128, 128, 64
    count = (1 << 18) // length + 4
    tokens = count * length
    starts = torch.arange(count + 1, dtype=torch.int32, device=place) * length
    q, k, v = (torch.zeros(tokens, h, dim, dtype=torch.bfloat16, device=place) for h in (heads, 8, 8))
    watched = [slice(0, length), slice(tokens // 2, tokens // 2 + length), slice(tokens - length, tokens)]
    for part in watched:
        for x in (q, k, v):
            x[part] = torch.randn(x[part].shape, device=place).bfloat16()
    request = AttentionRequest(**{**BASE, "num_q_heads": heads, "num_kv_heads": 8}, phases="prefill")

    def check(kernel: hal.Kernel) -> list[str]:
        call = resolve_target(kernel.target)(request, device)
        out = call(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=length, max_seqlen_k=length)
        alone = [call(q[part][None], k[part][None], v[part][None])[0] for part in watched]
        same = [torch.allclose(out[p], x, atol=2e-2) for p, x in zip(watched, alone, strict=True)]
        return [] if all(same) else [f"WRONG: of the first, a middle and the last sequence {same} are right"]

    served = [kernel for kernel, _ in serving("attention", "prefill", lambda more: request, device)]
    served = [kernel for kernel in served if kernel.library != "reference"]
    assert not (found := faults([(k.name, lambda k=k: check(k)) for k in served])), "\n".join(found)
