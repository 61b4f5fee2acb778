"""``FUSED_ADD_RMS_NORM``: the residual takes up x, and is normalised. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, residual, weight, *, out=None) -> out``::

    residual = residual + x                       # in place, rounded to dtype
    out = rms_norm(residual, weight)              # of the rounded sum; see hal_ops.rms_norm

So the results are those of the two steps apart. x and residual are ``[..., hidden_size]`` in ``dtype``, two tensors;
weight is ``[hidden_size]`` in ``weight_dtype``. Sums are float32 (float64 for float64). The last dim is contiguous; the
leading dims may have any strides that fold into two.

Without ``out`` the result is new and contiguous. ``out`` has x's shape and dtype, and may be x itself.
"""

from __future__ import annotations

from typing import ClassVar

from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._traced import Traced
from hal_ops.rms_norm.op import RmsNormRequest

__all__ = ["FUSED_ADD_RMS_NORM", "FusedAddRmsNormRequest"]


@record(frozen=True, kw_only=True)
class FusedAddRmsNormRequest(RmsNormRequest):
    """What a caller needs from the sum and its normalisation. Fields are those of ``rms_norm``.

    With ``needs_grad`` the backward of an earlier call survives the later changes of the residual.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "fused_add_rms_norm"


FUSED_ADD_RMS_NORM = Op(
    name=FusedAddRmsNormRequest.op,
    summary="residual + x in place, and its RMS normalisation",
    request=FusedAddRmsNormRequest,
    keywords={"call": ("out",)},
    reference={"call": "hal_ops.fused_add_rms_norm.reference:fused_add_rms_norm"},
    cases="hal_ops.fused_add_rms_norm.cases:make_case",
    check="hal_ops.fused_add_rms_norm.inputs:check",
    traced=Traced(
        "Tensor x, Tensor(a!) residual, Tensor weight", outputs="hal_ops.fused_add_rms_norm.reference:outputs"
    ),
)
