"""What is wrong with the arguments of a layer normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import read, vector, written
from hal_ops.layer_norm.op import LayerNormRequest

__all__ = ["check"]


def check(request: LayerNormRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    del values
    hidden, dtype = request.hidden_size, torch_dtype(request.dtype)
    of_x, of_vector = read((hidden,), request.dtype, device), vector(hidden, request.weight_dtype, device)
    of_weight, of_bias = (of_vector if given else _absent for given in (request.weight, request.bias))

    def problem(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, out: Tensor | None = None
    ) -> str:
        wrong = of_x("x", x) or of_weight("weight", weight) or of_bias("bias", bias)
        return wrong if wrong or out is None else written("out", out, x.shape, dtype, device)

    return problem


def _absent(name: str, x: object) -> str:
    return "" if x is None else f"{name} is given, and this was bound with {name}=False: ask for {name}=True"
