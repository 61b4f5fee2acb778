"""What is wrong with the arguments of an RMS normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import read, vector, written
from hal_ops.rms_norm.op import RmsNormRequest

__all__ = ["check"]


def check(request: RmsNormRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    del values
    hidden, dtype = request.hidden_size, torch_dtype(request.dtype)
    of_x, of_weight = read((hidden,), request.dtype, device), vector(hidden, request.weight_dtype, device)

    def problem(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> str:
        wrong = of_x("x", x) or of_weight("weight", weight)
        return wrong if wrong or out is None else written("out", out, x.shape, dtype, device)

    return problem
