"""Inputs for RMS normalisation: rows of very different sizes, one of zeros."""

from __future__ import annotations

from typing import Any

import torch

from hal_ops._row_case import RowCase, draw, variants, views
from hal_ops.rms_norm.op import RmsNormRequest
from hal_ops.rms_norm.reference import rms_norm
from hal_ops.rows import empty_like

__all__ = ["make_case"]


def make_case(
    request: RmsNormRequest,
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
    x *= torch.logspace(-2, 2, tokens).unsqueeze(-1).to(x.dtype)
    x[tokens // 2] = 0
    weight = draw(generator, request.hidden_size, dtype=request.weight_dtype, device=device)
    args: tuple[Any, ...] = (views(x.to(device), form), weight)
    label = f"rms_norm {request.dtype}, hidden {request.hidden_size}, seed {seed}, {form}"
    return RowCase(request, label, args, rms_norm, empty_like, form=form)


make_case.variants = variants()  # type: ignore[attr-defined]
