"""``GELU_AND_MUL``: the gate of a feed-forward layer such as Gemma's. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, *, out=None) -> out``::

    gate, up = x[..., :hidden_size], x[..., hidden_size:]
    out = gelu(gate) * up
    gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))                                   # approximate="none"
    gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z ** 3)))       # approximate="tanh"

x is ``[..., 2 * hidden_size]``, out ``[..., hidden_size]``, both in ``dtype``. Computed in float32 (float64 for
float64) and rounded once. The last dim is contiguous; the leading dims may have any strides that fold into two.
Without ``out`` the result is new and contiguous; ``out`` shares no memory with x.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import one_of
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import required
from hal_ops._row_request import RowRequest
from hal_ops._traced import Traced

__all__ = ["GELU_AND_MUL", "GeluAndMulRequest"]


@record(frozen=True, kw_only=True)
class GeluAndMulRequest(RowRequest):
    """What a caller needs from the gate.

    Fields:
        hidden_size: elements a row of out; x has twice as many. dtype: format of x and out.
        approximate: ``"none"`` (with erf; ``"erf"`` is another word for it) or ``"tanh"``, as in torch.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "gelu_and_mul"

    approximate: str = required(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        put: Any = object.__setattr__
        put(self, "approximate", "none" if self.approximate == "erf" else self.approximate)
        one_of("approximate", self.approximate, ("none", "tanh"))


GELU_AND_MUL = Op(
    name=GeluAndMulRequest.op,
    summary="gelu(first half) * second half",
    request=GeluAndMulRequest,
    keywords={"call": ("out",)},
    reference={"call": "hal_ops.gelu_and_mul.reference:gelu_and_mul"},
    cases="hal_ops.gelu_and_mul.cases:make_case",
    check="hal_ops._gate:check",
    traced=Traced("Tensor x", outputs="hal_ops.gelu_and_mul.reference:outputs"),
)
