"""Inputs for ``logit_softcap``, and the judgement of what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hal_acme.ops.logit_softcap.op import LogitSoftcapRequest
from hal_ops import torch_dtype
from hal_ops.compare import Comparison, compare

__all__ = ["LogitSoftcapCase", "make_case"]


@dataclasses.dataclass(frozen=True)
class LogitSoftcapCase:
    """Logits around zero, and far beyond the cap on either side."""

    request: LogitSoftcapRequest
    label: str
    args: tuple[Tensor]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def call(self, implementation: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What the implementation makes of the inputs."""
        return {"out": implementation(*self.args)}

    def expected(self) -> dict[str, Tensor]:
        """What is right, in float64."""
        return {"out": self._formula(torch.float64)}

    def check(self, implementation: Callable[[Tensor], Tensor]) -> tuple[Comparison, ...]:
        """Call the implementation and judge its output by what plain torch makes of the formula in the same dtype."""
        out = self.call(implementation)["out"]
        wanted = torch_dtype(self.request.dtype)
        if out.dtype != wanted:
            return (Comparison(self.label, (f"its dtype is {out.dtype}; the contract says {wanted}",)),)
        right, plain = self._formula(torch.float64), self._formula(wanted)
        return (compare(out, right, plain, dtype=self.request.dtype, name=self.label),)

    def _formula(self, dtype: torch.dtype) -> Tensor:
        logits = self.args[0].to("cpu", dtype)
        return self.request.cap * torch.tanh(logits / self.request.cap)


def make_case(
    request: LogitSoftcapRequest, phase: str = "call", *, device: torch.device | str = "cpu", seed: int = 0
) -> LogitSoftcapCase:
    """Logits of 2 by 7 tokens over 129 words, with a spread of three caps."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * request.cap * torch.randn(2, 7, 129, generator=draw)
    label = f"logit_softcap {request.dtype}, cap {request.cap:g}, seed {seed}"
    return LogitSoftcapCase(request, label, (logits.to(device, torch_dtype(request.dtype)),))
