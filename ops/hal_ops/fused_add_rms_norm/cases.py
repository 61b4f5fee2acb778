"""Inputs for the sum and its normalisation: rows of very different sizes, one whose sum is zero."""

from __future__ import annotations

import torch

from hal_ops._row_case import RowCase, draw, variants, views
from hal_ops.fused_add_rms_norm.op import FusedAddRmsNormRequest
from hal_ops.fused_add_rms_norm.reference import fused_add_rms_norm
from hal_ops.rows import empty_like

__all__ = ["make_case"]


def make_case(
    request: FusedAddRmsNormRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> RowCase:
    """Random rows. ``form`` is one of :data:`hal_ops._row_case.FORMS`; ``"strided"`` has 18 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, tokens).unsqueeze(-1)
    x, residual = (draw(generator, tokens, request.hidden_size, dtype=request.dtype) for _ in range(2))
    x, residual = (y * sizes.to(y.dtype) for y in (x, residual))
    residual[tokens // 2] = -x[tokens // 2]
    weight = draw(generator, request.hidden_size, dtype=request.weight_dtype, device=device)
    args = (*(views(y.to(device), form) for y in (x, residual)), weight)
    label = f"fused_add_rms_norm {request.dtype}, hidden {request.hidden_size}, seed {seed}, {form}"
    return RowCase(request, label, args, fused_add_rms_norm, empty_like, mutated={1: "residual"}, form=form)


make_case.variants = variants()  # type: ignore[attr-defined]
