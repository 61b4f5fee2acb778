"""What references and torch kernels of ops over rows share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype

__all__ = ["by_parts", "deliver", "wide_format"]

_MOST_ELEMENTS = 1 << 31
_MOST_ROWS = 1 << 22


def wide_format(dtype: str, accumulate: torch.dtype | None = None) -> torch.dtype:
    """The format that sums are made in: float32, and float64 for float64; ``accumulate`` overrides."""
    return accumulate or (torch.float64 if torch_dtype(dtype) == torch.float64 else torch.float32)


def deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The result in ``dtype``, contiguous; or written to ``out``, which has its shape and that dtype."""
    return result.to(dtype).contiguous() if out is None else out.copy_(result)


def by_parts(normalize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What torch's own kernel makes of x ``[..., hidden]``, given as many rows at a time as it counts right.

    On CUDA it finds rows in 32 bits: past 2**32 elements it is wrong, forward and backward (pytorch#181555; ``rms_norm`` of
    2.11.0 was seen so on an H200). On ROCm it is also wrong from 2**23 rows on (pytorch#184826). Autograd passes through.
    """
    most = _rows_at_a_time(x)
    if x.numel() <= most * x.shape[-1]:
        return normalize(x)
    parts = torch.split(x.reshape(-1, x.shape[-1]), most)
    return torch.cat([normalize(part) for part in parts]).view(x.shape)


def _rows_at_a_time(x: Tensor) -> int:
    most = max(1, _MOST_ELEMENTS // x.shape[-1])
    if x.is_cpu:
        return sys.maxsize
    return min(most, _MOST_ROWS) if torch.version.hip else most
