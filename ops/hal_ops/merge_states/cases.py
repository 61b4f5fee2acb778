"""Inputs for the merge of attention states: real states of split keys, empty states, both empty, garbage in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.case import Case
from hal_ops.compare import Comparison, compare, compare_lse
from hal_ops.merge_states.op import MergeStatesRequest
from hal_ops.merge_states.reference import merge

__all__ = ["MergeStatesCase", "make_case"]


@dataclasses.dataclass(frozen=True)
class MergeStatesCase(Case):
    """Two states of the same tokens."""

    request: MergeStatesRequest
    label: str
    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        out, lse = implementation(*self.args, **self.kwargs)
        return {"out": out, "lse": lse}

    def expected(self) -> dict[str, Tensor]:
        return self._oracle(torch.float64)

    def low_precision(self) -> dict[str, Tensor]:
        """What plain torch makes of it with every step in the request's dtype."""
        return self._oracle(torch_dtype(self.request.dtype))

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        found, right, low = self.call(implementation), self.expected(), self.low_precision()
        dtype = self.request.dtype
        wanted = torch_dtype(dtype)
        if found["out"].dtype != wanted:
            fault = f"its dtype is {found['out'].dtype}; the contract says {wanted}"
            return (Comparison(f"{self.label}: out", (fault,)),)
        return (
            compare(found["out"], right["out"], low["out"], dtype=dtype, name=f"{self.label}: out"),
            compare_lse(found["lse"], right["lse"], dtype="float32", name=f"{self.label}: lse"),
        )

    def _oracle(self, accumulate: torch.dtype) -> dict[str, Tensor]:
        out, lse = merge(self.request, "cpu", accumulate=accumulate, rounded=False)(*(x.cpu() for x in self.args))
        return {"out": out, "lse": lse}


def make_case(
    request: MergeStatesRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    tokens: int = 19,
) -> MergeStatesCase:
    """Random states; some rows have no key in the first, the second or both, and NaN in the out of those states."""
    draw = torch.Generator().manual_seed(seed)
    args = []
    for turn in range(2):
        out = torch.randn(tokens, request.num_heads, request.v_head_dim, generator=draw)
        lse = 5 * torch.randn(tokens, request.num_heads, generator=draw)
        empty = torch.arange(tokens) % 6
        empty = (empty == turn + 1) | (empty == 4)
        lse[empty] = -torch.inf
        out[empty] = torch.nan if turn else 0.0
        args += [out.to(torch_dtype(request.dtype)).to(device), lse.to(device)]
    label = f"merge_attention_states {request.dtype}, seed {seed}, {tokens} tokens"
    return MergeStatesCase(request, label, tuple(args))
