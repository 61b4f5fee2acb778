"""On hardware: truly large tensors through every kernel that can run here, a few rows of which are looked at.

More than 2**32 elements, more sequences than a grid is wide, millions of keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_kernel import BASE, faults, serving
from torch import Tensor

import hal
from hal import _plugins
from hal._plan import make_step
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


@pytest.mark.parametrize("op", ["rms_norm", "fused_add_rms_norm", "layer_norm", "silu_and_mul"])
def test_rows_one_behind_the_other(op: str, device: hal.Device) -> None:  # requirement P24
    """Truly that many elements: the last rows are those of a small call, and no other row is changed."""
    place, hidden = device.torch_device(), 8192 if op == "silu_and_mul" else 16384
    x = torch.zeros((1 << 18) + 64, 16384, dtype=torch.bfloat16, device=place)
    last = torch.randn(64, 16384, device=place).bfloat16()
    weight = torch.rand(hidden, device=place)
    weights = {"silu_and_mul": [], "layer_norm": [weight, weight * 0]}.get(op, [weight.bfloat16()])
    wide = {"weight_dtype": "float32"} if op == "layer_norm" else {}
    request = _plugins.registry().op(op).request(hidden_size=hidden, **wide)

    def check(kernel: hal.Kernel) -> list[str]:
        call = resolve_target(kernel.target)(request, device)
        x[-64:] = last
        if op == "fused_add_rms_norm":
            out = call(x, x.clone(), *weights, out=x)
            right = call(last.clone(), last.clone(), *weights)
        else:
            out, right = call(x, *weights), call(last, *weights)
        same = torch.allclose(out[-64:], right, atol=2e-2) and not out[:-64].any()
        x.zero_()
        return [] if same else ["WRONG"]

    served = [kernel for kernel, _ in serving(op, "call", lambda more: request, device)]
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k: check(k)) for k in served])), "\n".join(found)


def test_tokens_one_behind_the_other(device: hal.Device) -> None:  # requirement P24
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


WIDE = 65_535
"""As many sequences as the second and third dim of a grid hold."""
REFUSE_MORE = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "fa2", "xqa", "fmha_v2")


@pytest.mark.parametrize("count", [WIDE, 70_001])
@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_as_many_sequences_as_a_grid_is_wide_and_more(phase: str, count: int, device: hal.Device) -> None:
    # requirement P24, C7
    """Of one token each, so that the outputs are its values."""
    place = device.torch_device()
    torch.manual_seed(0)

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, "page_size": 16, "kv_layout": "NHD", **more}, phases=phase)

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        heads = asked.num_q_heads, asked.num_kv_heads, asked.num_kv_heads
        q, k, v = (torch.randn(count, h, asked.head_dim, device=place).bfloat16() for h in heads)
        call = resolve_target(kernel.target)(asked, device)
        if count > WIDE and kernel.library in REFUSE_MORE:
            with pytest.raises(ValueError, match="a call of 70001 sequences"):
                attend(call, asked.page_size, q, k, v)
            return []
        out = attend(call, asked.page_size, q, k, v)
        return [] if torch.allclose(out, v.repeat_interleave(asked.group_size, 1), atol=2e-2) else ["WRONG"]

    def attend(call: Any, size: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        if phase == "prefill":
            starts = torch.arange(count + 1, dtype=torch.int32, device=place)
            return call(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=1, max_seqlen_k=1)
        pages = torch.arange(count, dtype=torch.int32, device=place).flip(0).unsqueeze(1)
        caches = [torch.full((count, size, *k.shape[1:]), torch.nan, device=place, dtype=q.dtype) for _ in "kv"]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, 0] = x.flip(0)
        step = make_step([1] * count, [1] * count, pages, size, place)
        return call(q, *caches, step, call.plan(step))

    served = [
        (k, r) for k, r in serving("attention", phase, request, device) if not r.sinks and k.library != "reference"
    ]
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(found)


TRAINED = [
    k.name for k in _plugins.registry().kernels.values()
    if (k.op, k.phase) == ("attention", "prefill") and "needs_grad" in k.fields and "nvidia" in k.platforms
]  # fmt: skip


@pytest.mark.parametrize("form", ["dense", "ragged"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_tokens_one_behind_the_other(name: str, form: str, device: hal.Device) -> None:
    # requirement P24
    """Truly that many elements of q, k, v, and of their gradients; a sequence's are those that it has alone."""
    place, heads, dim, length = device.torch_device(), 64, 128, 64
    batch = (1 << 32) // (heads * dim * length) + 4
    fields = {**BASE, "num_q_heads": heads, "num_kv_heads": heads}
    request = AttentionRequest(**fields, phases="prefill", needs_grad=True)
    kernels = {k.name: k for k, _ in serving("attention", "prefill", lambda more: request, device)}
    if name not in kernels:
        pytest.skip(f"{name} cannot run here")
    call = resolve_target(kernels[name].target)(request, device)
    torch.cuda.empty_cache()
    watched = [0, batch // 2, batch - 1]
    drawn = [torch.randn(3, length, heads, dim, device=place).bfloat16() for _ in range(4)]

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        count = tensors[0].shape[0]
        starts = torch.arange(count + 1, dtype=torch.int32, device=place) * length
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": length, "max_seqlen_k": length}
        tensors = [x.flatten(0, 1) for x in tensors] if form == "ragged" else tensors
        q, k, v = (x.requires_grad_() for x in tensors[:3])
        call(q, k, v, **(lengths if form == "ragged" else {})).backward(tensors[3])
        return [x.grad.view(count, length, heads, dim) for x in (q, k, v)]  # type: ignore[union-attr]

    def check() -> list[str]:
        whole = []
        for values in drawn:
            whole.append(torch.zeros((batch, length, heads, dim), dtype=torch.bfloat16, device=place))
            whole[-1][watched] = values
        found = [x[watched] for x in gradients(whole)]
        del whole
        right = gradients([x.clone() for x in drawn])
        return [n for n, a, b in zip("qkv", found, right, strict=True) if not torch.allclose(a, b, atol=5e-2)]

    assert not (found := faults([("gradients", check)])), "\n".join(found)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_millions_of_keys(phase: str, device: hal.Device) -> None:  # requirement P24
    """One row that attends to 3 million keys, of which some hundred have most of the weight."""
    place, size, keys = device.torch_device(), 16, 3_000_001
    tokens = 1 if phase == "decode" else 3
    torch.manual_seed(0)

    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, "page_size": size, "kv_layout": "NHD", **more}, phases=phase)

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        size, dim = asked.page_size, asked.head_dim
        count = -(-keys // size)
        caches = [torch.randn(count, size, 2, dim, device=place).bfloat16() for _ in "kv"]
        q = 3 * torch.randn(tokens, 8, dim, device=place).bfloat16()
        table = torch.randperm(count, device=place).int().unsqueeze(0)
        step = make_step([tokens], [keys], table.cpu(), size, place)
        call = resolve_target(kernel.target)(asked, device)
        out = call(q, *caches, step, call.plan(step))
        k, v = (cache[table[0].long()].flatten(0, 1)[:keys].float() for cache in caches)
        wrong = 0.0
        for token in range(tokens):
            seen = keys - tokens + token + 1
            scores = torch.einsum("hgd,khd->hgk", q[token].float().view(2, 4, dim), k[:seen]) / dim**0.5
            right = torch.einsum("hgk,khd->hgd", scores.softmax(-1), v[:seen]).view(8, dim)
            wrong = max(wrong, float((out[token].float() - right).norm() / right.norm()))
        return [f"WRONG: {wrong:.3g} of the norm"] if wrong > 2e-2 else []

    served = [
        (k, r) for k, r in serving("attention", phase, request, device) if not r.sinks and k.library != "reference"
    ]
    assert len(served) > 1
    assert not (found := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in served])), "\n".join(found)
