"""The contract of merging two attention results by their LSEs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hal_ops._dtypes import dtype_name
from hal_ops._op import Op
from hal_ops._request import Request, required

__all__ = ["MERGE_STATES", "MergeStatesRequest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeStatesRequest(Request):
    """What a caller needs from a merge: heads, elements a head, and the format of the outputs."""

    op: ClassVar[str] = "merge_attention_states"

    num_q_heads: int = required()
    v_head_dim: int = required(code="head_dim")
    dtype: str = required(default="bfloat16", code="dtype")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))


MERGE_STATES = Op(
    name="merge_attention_states",
    summary="one attention result from two over different keys, by their natural-log LSEs",
    request=MergeStatesRequest,
    reference={"call": "hal_ops.merge_states.reference:call"},
    cases="hal_ops.merge_states.cases:make_case",
)
