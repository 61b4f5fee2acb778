"""``SILU_AND_MUL``: the gate of a feed-forward layer such as Llama's. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, *, out=None) -> out``::

    gate, up = x[..., :hidden_size], x[..., hidden_size:]
    out = gate / (1 + exp(-gate)) * up

x is ``[..., 2 * hidden_size]``, out ``[..., hidden_size]``, both in ``dtype``. Computed in float32 (float64 for
float64) and rounded once. The last dim is contiguous; the leading dims may have any strides that fold into two.
Without ``out`` the result is new and contiguous; ``out`` shares no memory with x.
"""

from __future__ import annotations

from typing import ClassVar

from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._row_request import RowRequest
from hal_ops._traced import Traced

__all__ = ["SILU_AND_MUL", "SiluAndMulRequest"]


@record(frozen=True, kw_only=True)
class SiluAndMulRequest(RowRequest):
    """What a caller needs from the gate.

    Fields:
        hidden_size: elements a row of out; x has twice as many. dtype: format of x and out.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "silu_and_mul"


SILU_AND_MUL = Op(
    name=SiluAndMulRequest.op,
    summary="silu(first half) * second half",
    request=SiluAndMulRequest,
    keywords={"call": ("out",)},
    reference={"call": "hal_ops.silu_and_mul.reference:silu_and_mul"},
    cases="hal_ops.silu_and_mul.cases:make_case",
    check="hal_ops._gate:check",
    traced=Traced("Tensor x", outputs="hal_ops.silu_and_mul.reference:outputs"),
)
