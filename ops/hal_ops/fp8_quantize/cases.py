"""Inputs for the quantisation to FP8: rows of very different sizes, zeros, infinities, NaN, and values too large."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._row_case import RowCase, draw, variants, views
from hal_ops.compare import Comparison
from hal_ops.fp8_quantize.op import Fp8QuantizeRequest
from hal_ops.fp8_quantize.reference import fp8_quantize, outputs, scales_shape

__all__ = ["Fp8QuantizeCase", "make_case"]

_BESIDE = 0.01
"""Share of values that may be the other neighbour of a near tie."""


@dataclasses.dataclass(frozen=True)
class Fp8QuantizeCase(RowCase):
    """Values are compared by their place in the order of the format's numbers, scales as numbers."""

    def judge(self, name: str, found: Tensor, right: Tensor) -> Comparison:
        title, wanted = f"{self.label}: {name}", right.dtype
        if found.dtype != wanted or found.shape != right.shape:
            fault = f"it is {found.dtype} {tuple(found.shape)}; the contract says {wanted} {tuple(right.shape)}"
            return Comparison(title, (fault,))
        return (_judge_scales if name == "scales" else _judge_values)(title, found.cpu(), right)


def _judge_scales(title: str, found: Tensor, right: Tensor) -> Comparison:
    error = (found.double() - right.double()).abs()
    wrong = ~(error <= 1e-6 * right.double())
    share = f"{wrong.double().mean().item():.1%} of the scales are off"
    return Comparison(title, (share,) if bool(wrong.any()) else (), float(error.max()) if error.numel() else 0.0)


def _judge_values(title: str, found: Tensor, right: Tensor) -> Comparison:
    unknown = right.float().isnan()
    failures = [] if torch.equal(found.float().isnan(), unknown) else ["NaN is not where x has it"]
    steps = (_order(found) - _order(right)).abs().masked_fill(unknown, 0)
    beside = steps.ne(0).double().mean().item() if steps.numel() else 0.0
    if bool((steps > 1).any()):
        failures.append(f"{(steps > 1).double().mean().item():.1%} of the values are off by more than one step")
    if beside > _BESIDE:
        failures.append(f"{beside:.1%} of the values are off by one step; near ties are fewer than {_BESIDE:.0%}")
    return Comparison(title, tuple(failures), float(steps.max()) if steps.numel() else 0.0)


def _order(x: Tensor) -> Tensor:
    """Whole numbers in the order of the format's, one apart for neighbours."""
    bits = x.contiguous().view(torch.uint8).short()
    return torch.where(bits >= 128, 128 - bits, bits)


def make_case(
    request: Fp8QuantizeRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> Fp8QuantizeCase:
    """Random rows. ``form`` is "plain", "strided" (18 tokens; not for blocks of several rows) or "out"."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(generator, tokens, request.hidden_size, dtype=request.dtype)
    x = x * torch.logspace(-2, 2, tokens).unsqueeze(-1).to(x.dtype)
    x[tokens // 2] = 0
    odd = torch.randperm(x.numel(), generator=generator)[:6]
    x.view(-1)[odd] = torch.tensor([torch.inf, -torch.inf, torch.nan] * 2)[: len(odd)].to(x.dtype)
    if request.block_rows == 1:
        x = views(x, form)
    kwargs = {"scale": _given(generator, request, x).to(device)} if request.static else {}
    label = f"fp8_quantize {request.dtype} to {request.fp8_dtype} a {request.granularity}, seed {seed}, {form}"
    return Fp8QuantizeCase(
        request,
        label,
        (x.to(device),),
        fp8_quantize,
        outputs(request),
        kwargs=kwargs,
        names=("values", "scales"),
        form=form,
    )


def _given(generator: torch.Generator, request: Fp8QuantizeRequest, x: Tensor) -> Tensor:
    """Scales with which some values are too large for the format."""
    most = torch.finfo(torch_dtype(request.fp8_dtype)).max
    shape = scales_shape(request, tuple(x.shape))
    return (0.5 + torch.rand(shape, generator=generator)) * 10 / most


make_case.variants = variants(inplace=False)  # type: ignore[attr-defined]
