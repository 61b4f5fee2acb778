"""What references and torch kernels of ops over rows share."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype

__all__ = ["deliver", "wide_format"]


def wide_format(dtype: str, accumulate: torch.dtype | None = None) -> torch.dtype:
    """The format that sums are made in: float32, and float64 for float64; ``accumulate`` overrides."""
    return accumulate or (torch.float64 if torch_dtype(dtype) == torch.float64 else torch.float32)


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, contiguous; or written to ``out``, rounded to its format."""
    return result.contiguous() if out is None else out.copy_(result)
