"""The cosines and sines of the rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.rotary_embedding.scaling import Scaling

__all__ = ["rotary_frequencies", "rotary_tables"]


def rotary_frequencies(rotary_dim: int, *, base: float = 10000.0, scaling: Scaling | None = None) -> list[float]:
    """Radians a position of each pair, ``rotary_dim / 2`` of them.

    Raises:
        ValueError: ``rotary_dim`` is odd or below 2, or ``base`` is not above 1.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim}: give an even number of at least 2")
    if base <= 1:
        raise ValueError(f"base={base}: give a number above 1")
    plain = [base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
    return plain if scaling is None else scaling.scaled(plain, base)


def rotary_tables(
    rotary_dim: int,
    max_position: int,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: Any = "float32",
    device: Any = "cpu",
) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``[max_position, rotary_dim / 2]`` in ``dtype``, for ``rotary_embedding``.

    Angles are computed in float64 on the CPU, so far positions are as exact as near ones (in float32 an angle at
    position 100,000 is off by up to 0.004 rad).

    Args:
        rotary_dim: elements a head that turn. max_position: positions 0 to ``max_position - 1``.
        base: of the frequencies (``rope_theta``). scaling: ``YarnScaling``, ``Llama3Scaling`` or ``LinearScaling``.

    Raises:
        ValueError: ``rotary_dim`` is odd or below 2, or ``base`` is not above 1.
    """
    frequencies = torch.tensor(rotary_frequencies(rotary_dim, base=base, scaling=scaling), dtype=torch.float64)
    angles = torch.arange(max_position, dtype=torch.float64).unsqueeze(-1) * frequencies
    factor = 1.0 if scaling is None else scaling.table_factor()
    cos, sin = ((table * factor).to(torch_dtype(dtype)).to(device) for table in (angles.cos(), angles.sin()))
    return cos, sin
