"""On hardware: sequences of many tiles, whose keys kernels split over blocks, under every mask, through every kernel.

Checks of a kernel's corners have short sequences, since the reference is slow; what libraries get wrong behind the
first tile shows here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_kernel import BASE, faults, serving
from torch import Tensor

import hal
from hal import _plugins
from hal.testing._gradients import gradient_problems
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

pytestmark = pytest.mark.gpu

MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal window": {"window": (333, 0)},
    "full": {"causal": False},
    "left window": {"causal": False, "window": (333, None)},
    "two windows": {"causal": False, "window": (333, 40)},
    "softcap": {"softcap": 20.0},
}
LENGTHS: dict[str, list[list[tuple[int, int]]]] = {
    "prefill": [[(1024, 1024)], [(512, 1024), (300, 4096), (129, 129)]],
    "extend": [[(300, 4096)], [(512, 1024), (1, 3000), (77, 2049)]],
    "decode": [[(1, 8191)], [(1, 1), (1, 777), (1, 4096), (1, 130)]],
}
HEADS: dict[str, dict[str, Any]] = {
    "grouped": {"num_q_heads": 8, "num_kv_heads": 2},
    "alone": {"num_q_heads": 4, "num_kv_heads": 4},
}
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
STRONG = -120.0
"""A logit; e to its negative is past the largest float32."""


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device()


def served(phase: str, fields: dict[str, Any], device: hal.Device) -> list[tuple[hal.Kernel, Any]]:
    def request(more: dict[str, Any]) -> Request:
        return AttentionRequest(**{**BASE, "page_size": 16, "kv_layout": "NHD", **more, **fields}, phases=phase)

    return [(k, r) for k, r in serving("attention", phase, request, device) if k.library != "reference"]


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("phase", list(LENGTHS))
def test_values(phase: str, mask: str, device: hal.Device) -> None:  # requirement B4, B5, D3, D4, D14, E8, P22
    place = str(device.torch_device())

    def check(kernel: hal.Kernel, asked: Any) -> list[str]:
        call = resolve_target(kernel.target)(asked, device)
        found = []
        for seed, lengths in enumerate(LENGTHS[phase]):
            case = make_case(asked, phase, device=place, lengths=lengths, seed=seed, oracle=place)
            found += [str(comparison) for comparison in case.check(call) if not comparison.ok]
        return found

    kernels = served(phase, MASKS[mask], device)
    assert kernels
    assert not (wrong := faults([(k.name, lambda k=k, r=r: check(k, r)) for k, r in kernels])), "\n".join(wrong)


TRAINED = [
    k.name for k in _plugins.registry().kernels.values()
    if (k.op, k.phase) == ("attention", "prefill") and "needs_grad" in k.fields and "nvidia" in k.platforms
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name: str, dims: tuple[int, int], heads: str, causal: bool, device: hal.Device) -> None:
    # requirement P24, B15
    """At every head dim that is declared: ragged, of unequal lengths, and dense."""
    head, v_head = dims
    fields = {**HEADS[heads], "head_dim": head, "v_head_dim": v_head, "causal": causal, "needs_grad": True}
    request = {k.name: r for k, r in served("prefill", fields, device)}.get(name)
    if request is None:
        pytest.skip(f"{name} does not serve this here")
    op = _plugins.registry().ops["attention"]
    call = resolve_target(_plugins.registry().kernels[name].target)(request, device)
    for form, lengths in (("ragged", [(200, 200), (64, 64), (129, 129)]), ("dense", [(192, 192)] * 2)):
        case = make_case(request, "prefill", device=device.torch_device(), lengths=lengths, form=form)
        assert not (problems := gradient_problems(case, call, op, "prefill")), "\n".join(problems)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_where_every_score_is_strongly_negative(name: str, causal: bool, device: hal.Device) -> None:
    # requirement P24
    """Keys that a tile has beside a sequence's own have no part, though their scores of 0 would be larger by far."""
    fields = {**HEADS["alone"], "head_dim": 64, "causal": causal, "needs_grad": True}
    request = {k.name: r for k, r in served("prefill", fields, device)}.get(name)
    if request is None:
        pytest.skip(f"{name} does not serve this here")
    call = resolve_target(_plugins.registry().kernels[name].target)(request, device)
    wide = AttentionRequest(**{**fields, "num_q_heads": 4, "dtype": "float32"}, phases="prefill")
    right = resolve_target(_plugins.registry().ops["attention"].reference["prefill"])(wide, device)
    for length in (1, 2, 63, 64, 65, 192, 320, 704):
        torch.manual_seed(length)
        shape, place = (2, length, 4, 64), device.torch_device()
        q, k, v, out = (torch.randn(shape, device=place).bfloat16() * s for s in (0.1, 0.1, 1.0, 1.0))
        q[..., 0], k[..., 0] = 1.0, STRONG * 8

        def gradients(fn: Any, tensors: list[Tensor], to: Tensor) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in tensors]
            fn(*leaves).backward(to)
            return [x.grad for x in leaves]  # type: ignore[misc]

        found = gradients(call, [q, k, v], out)
        wanted = gradients(right, [q.float(), k.float(), v.float()], out.float())
        for title, a, b in zip("qkv", found, wanted, strict=True):
            assert a.isfinite().all(), f"the gradient of {title} at length {length}"
            a, b = a[..., 1:].float(), b[..., 1:]  # Beside it the gradient of q is 0 times large keys.
            error = (a - b).norm() / b.norm().clamp_min(0.1)
            assert error < 0.05, f"the gradient of {title} at length {length} is off by {error:.1%}"
