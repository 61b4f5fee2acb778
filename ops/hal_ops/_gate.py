"""What the gated activations share: halves, outputs, and the calls over them by torch. Any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops._row_case import RowCase, draw, views
from hal_ops._row_inputs import read, written
from hal_ops._row_request import RowRequest
from hal_ops._torch_rows import deliver, wide_format
from hal_ops.rows import half_of

__all__ = ["check", "gate_case", "gate_reference", "torch_gate"]

Activation = Callable[[Tensor], Tensor]


def check(request: RowRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """What is wrong with the arguments of a call; see :attr:`hal_ops.Op.check`."""
    del values
    hidden, dtype = request.hidden_size, torch_dtype(request.dtype)
    of_x = read((2 * hidden,), request.dtype, device)

    def problem(x: Tensor, *, out: Tensor | None = None) -> str:
        wrong = of_x("x", x)
        return wrong if wrong or out is None else written("out", out, (*x.shape[:-1], hidden), dtype, device)

    return problem


def gate_reference(
    request: RowRequest, activation: Activation, accumulate: torch.dtype | None, rounded: bool
) -> Callable[..., Tensor]:
    """``activation(first half) * second half``, every step in the format of the sums."""
    wide = wide_format(request.dtype, accumulate)

    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        gate, up = x.to(wide).chunk(2, -1)
        return deliver(activation(gate) * up, x.dtype if rounded else wide, out)

    return call


def torch_gate(request: RowRequest, activation: Activation) -> Callable[..., Tensor]:
    """The same by torch's operators, with gradients where the request has them."""
    hidden, dtype, needs_grad = request.hidden_size, torch_dtype(request.dtype), request.needs_grad
    wide = wide_format(request.dtype)

    def call(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        gate, up = activation(x[..., :hidden].to(wide)), x[..., hidden:]
        return deliver(gate * up if needs_grad else gate.mul_(up), dtype, out)

    return call


def gate_case(
    request: RowRequest, factory: Callable[..., Any], *, device: torch.device | str, seed: int, form: str, tokens: int
) -> RowCase:
    """Random rows, wide enough that the activation saturates on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * draw(generator, tokens, 2 * request.hidden_size, dtype=request.dtype)
    label = f"{request.op} {request.dtype}, hidden {request.hidden_size}, seed {seed}, {form}"
    return RowCase(request, label, (views(x.to(device), form),), factory, half_of, form=form)
