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
        top = torch.maximum(states[0][1], states[1][1]).detach()
        top = torch.where(top > -torch.inf, top, 0.0)
        some = [lse > -torch.inf for _, lse in states]
        # Infinities, and whatever an out holds that counts for nothing, are left out before they meet a gradient.
        weights = [
            torch.where(s, torch.exp(torch.where(s, lse, 0.0) - top), 0.0)
            for s, (_, lse) in zip(some, states, strict=True)
        ]
        total = weights[0] + weights[1]
        nothing = total == 0
        whole = torch.where(nothing, 1.0, total)
        parts = (torch.where(s.unsqueeze(-1), part, 0.0) for s, (part, _) in zip(some, states, strict=True))
        merged = sum(part * (weight / whole).unsqueeze(-1) for part, weight in zip(parts, weights, strict=True))
        assert isinstance(merged, Tensor)
        lse = torch.where(nothing, -torch.inf, top + torch.log(whole))
        out = merged.to(out_a.dtype) if rounded else merged
        return out, lse.float() if rounded else lse

    return call
