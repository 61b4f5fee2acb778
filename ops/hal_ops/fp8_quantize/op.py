"""``FP8_QUANTIZE``: values divided by a scale and rounded to an FP8 format. Needs no torch.

``factory(request, device) -> fn`` with ``fn(x, scale=None, *, out=None) -> (values, scales)``. One scale belongs to the
whole ``"tensor"``, to each ``"token"`` (row), or to each ``"block"`` of ``block_rows`` by ``block_size`` elements, the
last ones of which may be smaller::

    scale = max(largest finite |x| of its group / largest finite value of the format, 2 ** -126)
    values = x / scale, clamped to the format's finite values, rounded to nearest even

With ``static=True`` the scales are given instead. The quotient is a float32 one, of x and the scale or of x and the
scale's reciprocal, so a value within float32's rounding of a tie may be either neighbour. Infinities count as the
largest finite value when values are made, and are left out, as NaN is, when the scale is made; NaN stays NaN.

x is ``[..., hidden_size]`` in ``dtype`` (``[rows, hidden_size]`` where ``block_rows`` is above 1), its last dim
contiguous, the leading dims of any strides that fold into two. values are in ``fp8_dtype``, of x's shape. scales are
float32: ``[1]`` for a tensor, ``[..., 1]`` for tokens, ``[..., ceil(hidden_size / block_size)]`` for blocks, with the
number of blocks in place of the number of rows where ``block_rows`` is above 1.

Without ``out`` both are new and contiguous (with ``static=True`` the scales are a copy). ``out`` is a pair of tensors
of those shapes; the values' last dim is contiguous, the scales may have any strides.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag, one_of, positive
from hal_ops._dtypes import FP8_DTYPES, dtype_name
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import feature, required
from hal_ops._row_request import RowRequest
from hal_ops._traced import Traced

__all__ = ["FP8_QUANTIZE", "Fp8QuantizeRequest"]

_BLOCK = {"block_size": 128, "block_rows": 1}


@record(frozen=True, kw_only=True)
class Fp8QuantizeRequest(RowRequest):
    """What a caller needs from the quantisation.

    Fields:
        hidden_size: elements a row. dtype: format of x.
        fp8_dtype: format of the values, exact, or ``"fp8"`` for the device's own e4m3 format.
        granularity: what has one scale: the ``"tensor"``, a ``"token"`` or a ``"block"``.
        block_size: elements of a block's row; block_rows: rows of a block; other granularities have neither.
        static: the scales are given at the call.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: no kernel has a gradient.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "fp8_quantize"
    derived: ClassVar[tuple[str, ...]] = ("group_elements",)

    fp8_dtype: str = required(default="fp8", code="dtype")
    granularity: str = required(default="token")
    block_size: int = feature(_BLOCK["block_size"])
    block_rows: int = feature(_BLOCK["block_rows"])
    static: bool = feature(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        put: Any = object.__setattr__
        if self.fp8_dtype != "fp8":
            put(self, "fp8_dtype", dtype_name(self.fp8_dtype))
            one_of("fp8_dtype", self.fp8_dtype, FP8_DTYPES)
        one_of("granularity", self.granularity, ("tensor", "token", "block"))
        for name, default in _BLOCK.items():
            positive(name, getattr(self, name))
            if self.granularity != "block" and getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)} says nothing of granularity={self.granularity!r}")
        flag("static", self.static)

    @property
    def group_elements(self) -> int:
        """Elements of a token or block that share a scale; 1 for a tensor, whose number no request knows."""
        if self.granularity == "block":
            return self.block_rows * self.block_size
        return self.hidden_size if self.granularity == "token" else 1

    def resolved(self, capabilities: frozenset[str]) -> Fp8QuantizeRequest:
        """Replace the generic ``"fp8"`` by the e4m3 flavour that the device declares.

        Raises:
            ValueError: the device declares neither ``fp8_e4m3fn`` nor ``fp8_e4m3fnuz``.
        """
        if self.fp8_dtype != "fp8":
            return self
        for flavour in ("e4m3fn", "e4m3fnuz"):
            if f"fp8_{flavour}" in capabilities:
                return self.replace(fp8_dtype=f"float8_{flavour}")
        raise ValueError(
            "fp8_dtype='fp8' stands for the device's own e4m3 format, and this device declares none "
            "(fp8_e4m3fn, fp8_e4m3fnuz); name the format exactly"
        )


FP8_QUANTIZE = Op(
    name=Fp8QuantizeRequest.op,
    summary="values divided by a scale a tensor, token or block, and rounded to FP8",
    request=Fp8QuantizeRequest,
    keywords={"call": ("scale", "out")},
    reference={"call": "hal_ops.fp8_quantize.reference:fp8_quantize"},
    cases="hal_ops.fp8_quantize.cases:make_case",
    check="hal_ops.fp8_quantize.inputs:check",
    traced=Traced("Tensor x, Tensor? scale=None", outputs="hal_ops.fp8_quantize.reference:outputs", results=2),
)
