"""Inputs for the GELU gate."""

from __future__ import annotations

import torch

from hal_ops._gate import gate_case
from hal_ops._row_case import RowCase, variants
from hal_ops.gelu_and_mul.op import GeluAndMulRequest
from hal_ops.gelu_and_mul.reference import gelu_and_mul

__all__ = ["make_case"]


def make_case(
    request: GeluAndMulRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> RowCase:
    """Random rows. ``form`` is "plain", "strided" (18 tokens) or "out"."""
    return gate_case(request, gelu_and_mul, device=device, seed=seed, form=form, tokens=tokens)


make_case.variants = variants(inplace=False)  # type: ignore[attr-defined]
