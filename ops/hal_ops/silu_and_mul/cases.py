"""Inputs for the SiLU gate."""

from __future__ import annotations

import torch

from hal_ops._gate import gate_case
from hal_ops._row_case import RowCase, variants
from hal_ops.silu_and_mul.op import SiluAndMulRequest
from hal_ops.silu_and_mul.reference import silu_and_mul

__all__ = ["make_case"]


def make_case(
    request: SiluAndMulRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> RowCase:
    """Random rows. ``form`` is "plain", "strided" (18 tokens) or "out"."""
    return gate_case(request, silu_and_mul, device=device, seed=seed, form=form, tokens=tokens)


make_case.variants = variants(inplace=False)  # type: ignore[attr-defined]
