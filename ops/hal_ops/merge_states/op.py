"""``MERGE_STATES``: attention over two sets of keys becomes attention over both. Needs no torch.

``factory(request, device) -> fn`` with ``fn(out_a, lse_a, out_b, lse_b) -> (out, lse)``: the outs are
``[..., num_heads, v_head_dim]`` in ``dtype``, the lses float32 ``[..., num_heads]``, natural logs of the denominators.
A state without keys has lse -inf and counts for nothing whatever its out holds; two of them give out 0 and lse -inf.
Sums are float32; ``out`` has ``dtype``.

More than two states: fold, ``merge(*merge(a, b), c)``; :func:`hal_ops.merge_states.torch_merge.merge_all` does it
without rounding in between. A sink may be in the lse of one state only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag, positive
from hal_ops._dtypes import dtype_name
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import Request, feature, required
from hal_ops._traced import Traced

__all__ = ["MERGE_STATES", "MergeStatesRequest"]


@record(frozen=True, kw_only=True)
class MergeStatesRequest(Request):
    """What a caller needs from the merge of attention states.

    Fields:
        num_heads: query heads; v_head_dim: elements a head of the outs. dtype: format of the outs.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "merge_attention_states"

    num_heads: int = required()
    v_head_dim: int = required(code="head_dim")
    dtype: str = required(default="bfloat16", code="dtype")
    deterministic: bool = feature(False)
    graph: bool = feature(False)
    needs_grad: bool = feature(False)

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        for name in ("num_heads", "v_head_dim"):
            positive(name, getattr(self, name))
        put(self, "dtype", dtype_name(self.dtype))
        for name in ("deterministic", "graph", "needs_grad"):
            flag(name, getattr(self, name))


MERGE_STATES = Op(
    name=MergeStatesRequest.op,
    summary="merge attention over two sets of keys into attention over both",
    request=MergeStatesRequest,
    reference={"call": "hal_ops.merge_states.reference:merge"},
    cases="hal_ops.merge_states.cases:make_case",
    check="hal_ops.merge_states.inputs:check",
    traced=Traced(
        "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b",
        outputs="hal_ops.merge_states.reference:outputs",
        results=2,
        takes_out=False,
    ),
)
