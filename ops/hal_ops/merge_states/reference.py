"""The oracle of the merge: numerators and denominators written out. Any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops.merge_states.op import MergeStatesRequest
from hal_ops.rows import empty_like

__all__ = ["merge", "outputs"]

Merge = Callable[[Tensor, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]


def outputs(request: MergeStatesRequest) -> Merge:
    """Makes empty outputs from the call's arguments."""
    del request

    def empty(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        return empty_like(out_a), empty_like(lse_a)

    return empty


def merge(
    request: MergeStatesRequest, device: object, *, accumulate: torch.dtype | None = None, rounded: bool = True
) -> Merge:
    """The ``call`` phase. ``rounded=False`` leaves the output in ``accumulate``: float32, or float64 if dtype is."""
    sums = accumulate or (torch.float64 if request.dtype == "float64" else torch.float32)

    def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        states = [(out.to(sums), lse.to(sums)) for out, lse in ((out_a, lse_a), (out_b, lse_b))]
        lse = torch.logaddexp(states[0][1], states[1][1])
        total = torch.zeros_like(states[0][0])
        for part, part_lse in states:
            some = (part_lse > -torch.inf).unsqueeze(-1)
            share = torch.exp(part_lse - lse).unsqueeze(-1)
            total = torch.where(some, total + part * share, total)
        out = total.to(out_a.dtype) if rounded else total
        return out, lse.float() if rounded else lse

    return call
