"""Inputs for layer normalisation: rows of very different sizes and means, one constant."""

from __future__ import annotations

import torch

from hal_ops._row_case import RowCase, draw, variants, views
from hal_ops.layer_norm.op import LayerNormRequest
from hal_ops.layer_norm.reference import layer_norm
from hal_ops.rows import empty_like

__all__ = ["make_case"]


def make_case(
    request: LayerNormRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> RowCase:
    """Random rows. ``form`` is one of :data:`hal_ops._row_case.FORMS`; ``"strided"`` has 18 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = draw(generator, tokens, request.hidden_size, dtype=request.dtype)
    x = x * torch.logspace(-2, 2, tokens).unsqueeze(-1).to(x.dtype)
    x[-(tokens // 3) :] += 4
    if request.eps:  # without it a row without deviations is 0 / 0, or not, by the last bit of its mean
        x[tokens // 2] = 3
    count = request.weight + request.bias
    affine = [draw(generator, request.hidden_size, dtype=request.weight_dtype, device=device) for _ in range(count)]
    label = f"layer_norm {request.dtype}, hidden {request.hidden_size}, seed {seed}, {form}"
    return RowCase(request, label, (views(x.to(device), form), *affine), layer_norm, empty_like, form=form)


make_case.variants = variants()  # type: ignore[attr-defined]
