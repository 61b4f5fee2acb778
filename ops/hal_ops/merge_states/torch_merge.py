"""The merge of attention states by torch. Any device, heads, dims and float dtype; deterministic; fit for graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hal_ops.merge_states.op import MergeStatesRequest
from hal_ops.merge_states.reference import Merge

__all__ = ["merge", "merge_all"]


def merge(request: MergeStatesRequest, device: object) -> Merge:
    """The ``call`` phase."""
    return _merge


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return merge_all([(out_a, lse_a), (out_b, lse_b)])


def merge_all(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Any number of states ``(out, lse)`` merged at once and rounded once, to the first's dtype.

    Sums are float32, or float64 if the first out is.

    Raises:
        ValueError: there are no states.
    """
    if not states:
        raise ValueError("merge_all of no states: give at least one pair (out, lse)")
    dtype = states[0][0].dtype
    states = [(out, lse.to(torch.promote_types(dtype, torch.float32))) for out, lse in states]
    top = states[0][1]
    for _, lse in states[1:]:
        top = torch.maximum(top, lse)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = [torch.exp(lse - top) for _, lse in states]
    total = torch.stack(weights).sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    share = total.reciprocal()
    out = _weighted(states[0], weights[0] * share)
    for state, weight in zip(states[1:], weights[1:], strict=True):
        out = out + _weighted(state, weight * share)
    return out.to(dtype), (top + torch.log(total)).masked_fill(nothing, -torch.inf).float()


def _weighted(state: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """A state's part of the sum; zeros where it saw no key, whatever its out holds there."""
    out, lse = state
    return out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0) * weight.unsqueeze(-1)
