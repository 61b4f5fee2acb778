"""The contract of ``logit_softcap``: ``fn(logits) -> Tensor``, ``cap * tanh(logits / cap)``.

``logits`` is ``[..., vocabulary]`` in the request's dtype, and so is the result. Gemma 2 bounds its last logits so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from hal_ops import Op, Request, dtype_name, feature, required

__all__ = ["LOGIT_SOFTCAP", "LogitSoftcapRequest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitSoftcapRequest(Request):
    """What a caller needs: the cap, the dtype of the logits, and whether it differentiates.

    Every kernel must say which caps and dtypes it takes (``required``); one that never heard of ``needs_grad`` is
    refused where it is wanted (``feature``).

    Raises:
        ValueError: a cap that is not a finite number above 0, or an unknown dtype.
    """

    op: ClassVar[str] = "logit_softcap"

    cap: float = required()
    dtype: str = required(default="bfloat16", code="dtype")
    needs_grad: bool = feature(False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cap", float(self.cap))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if not (math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"cap={self.cap:g}: give a finite number above 0")


LOGIT_SOFTCAP = Op(
    name="logit_softcap",
    summary="logits bounded by cap * tanh(logits / cap)",
    request=LogitSoftcapRequest,
    reference={"call": "hal_acme.ops.logit_softcap.kernels:reference"},
    cases="hal_acme.ops.logit_softcap.cases:make_case",
)
