"""``RMS_NORM``: each row divided by its root mean square, times a weight. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, weight, *, out=None) -> out``::

    out = x / sqrt(mean(x * x) + eps) * (weight + weight_offset)

x is ``[..., hidden_size]`` in ``dtype``; weight ``[hidden_size]`` in ``weight_dtype``; the mean is over the last dim.
All of it is computed in float32 (float64 for float64) and rounded once, to ``dtype``. The last dim is contiguous; the
leading dims may have any strides that fold into two, such as those of a slice of a fused projection.

Without ``out`` the result is new and contiguous. ``out`` has x's shape and dtype, and may be x itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import feature
from hal_ops._row_request import RowRequest, finite, float_format
from hal_ops._traced import Traced

__all__ = ["RMS_NORM", "RmsNormRequest"]


@record(frozen=True, kw_only=True)
class RmsNormRequest(RowRequest):
    """What a caller needs from RMS normalisation.

    Fields:
        hidden_size: elements a row. dtype: format of x and out; weight_dtype: of the weight (default: ``dtype``).
        eps: added to the mean of the squares. weight_offset: added to the weight (Gemma's checkpoints: 1).
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "rms_norm"

    weight_dtype: str = feature(lambda r: r.dtype, default=None)
    eps: float = feature(1e-6)
    weight_offset: float = feature(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        put: Any = object.__setattr__
        put(self, "weight_dtype", float_format("weight_dtype", self.weight_dtype or self.dtype))
        put(self, "eps", finite("eps", self.eps, least=0.0))
        put(self, "weight_offset", finite("weight_offset", self.weight_offset))


RMS_NORM = Op(
    name=RmsNormRequest.op,
    summary="rows divided by their root mean square, times a weight",
    request=RmsNormRequest,
    keywords={"call": ("out",)},
    reference={"call": "hal_ops.rms_norm.reference:rms_norm"},
    cases="hal_ops.rms_norm.cases:make_case",
    check="hal_ops.rms_norm.inputs:check",
    traced=Traced("Tensor x, Tensor weight", outputs="hal_ops.rms_norm.reference:outputs"),
)
