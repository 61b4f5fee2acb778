"""``LAYER_NORM``: rows less their mean, divided by their deviation, times a weight, plus a bias. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, weight=None, bias=None, *, out=None) -> out``::

    out = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias

x is ``[..., hidden_size]`` in ``dtype``; weight and bias are ``[hidden_size]`` in ``weight_dtype``, and are given
exactly when the request says so. All of it is computed in float32 (float64 for float64), the deviations from the mean
before they are squared, and rounded once, to ``dtype``. The last dim is contiguous; the leading dims may have any
strides that fold into two.

Without ``out`` the result is new and contiguous. ``out`` has x's shape and dtype, and may be x itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import feature
from hal_ops._row_request import RowRequest, finite, float_format
from hal_ops._traced import Traced

__all__ = ["LAYER_NORM", "LayerNormRequest"]


@record(frozen=True, kw_only=True)
class LayerNormRequest(RowRequest):
    """What a caller needs from layer normalisation.

    Fields:
        hidden_size: elements a row. dtype: format of x and out; weight_dtype: of weight and bias (default: ``dtype``).
        weight: whether there is one; bias: whether there is one.
        eps: added to the variance.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour, a bias without a weight among them.
    """

    op: ClassVar[str] = "layer_norm"

    weight_dtype: str = feature(lambda r: r.dtype, default=None)
    weight: bool = feature(True)
    bias: bool = feature(True)
    eps: float = feature(1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        put: Any = object.__setattr__
        put(self, "weight_dtype", float_format("weight_dtype", self.weight_dtype or self.dtype))
        put(self, "eps", finite("eps", self.eps, least=0.0))
        for name in ("weight", "bias"):
            flag(name, getattr(self, name))
        if self.bias and not self.weight:
            raise ValueError("bias=True, weight=False: a bias alone is not offered; give a weight of ones")


LAYER_NORM = Op(
    name=LayerNormRequest.op,
    summary="rows less their mean, divided by their standard deviation, times a weight, plus a bias",
    request=LayerNormRequest,
    keywords={"call": ("weight", "bias", "out")},
    reference={"call": "hal_ops.layer_norm.reference:layer_norm"},
    cases="hal_ops.layer_norm.cases:make_case",
    check="hal_ops.layer_norm.inputs:check",
    traced=Traced("Tensor x, Tensor? weight=None, Tensor? bias=None", outputs="hal_ops.layer_norm.reference:outputs"),
)
