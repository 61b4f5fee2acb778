"""The code of ``logit_softcap``: the oracle, and Acme's kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import hal
from hal_acme.ops.logit_softcap.op import LogitSoftcapRequest

__all__ = ["reference", "tanh_unit"]


def reference(request: LogitSoftcapRequest, device: hal.Device) -> Callable[[Tensor], Tensor]:
    """The oracle, for any device: float32, nothing in place, differentiable."""

    def call(logits: Tensor) -> Tensor:
        return (request.cap * (logits.float() / request.cap).tanh()).to(logits.dtype)

    return call


def tanh_unit(request: LogitSoftcapRequest, device: hal.Device) -> Callable[[Tensor], Tensor]:
    """Acme's kernel: in place on one float32 copy, hence not differentiable (and not declared to be)."""

    def call(logits: Tensor) -> Tensor:
        return (logits.float() / request.cap).tanh_().mul_(request.cap).to(logits.dtype)

    return call
