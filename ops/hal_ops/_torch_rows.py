"""What references and torch kernels of ops over rows share."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.rows import check_out

__all__ = ["deliver", "wide_format"]


def wide_format(dtype: str, accumulate: torch.dtype | None = None) -> torch.dtype:
    """The format that sums are made in: float32, and float64 for float64; ``accumulate`` overrides."""
    return accumulate or (torch.float64 if torch_dtype(dtype) == torch.float64 else torch.float32)


def deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None, name: str = "out") -> Tensor:
    """The result in ``dtype``, contiguous; or written to ``out``, which must have its shape and that dtype.

    Raises:
        ValueError: ``out`` has another shape or dtype.
    """
    if out is None:
        return result.to(dtype).contiguous()
    check_out(name, out, result.shape, dtype)
    return out.copy_(result)
