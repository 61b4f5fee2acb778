"""``ROTARY_EMBEDDING``: pairs of elements of q and k turned by angles that grow with the position. Needs no torch.

``factory(request, device) -> fn`` with ``fn(q, k, cos, sin, positions, *, out=None) -> (q, k)``; of each head the pair
``(a, b)`` number ``i`` becomes, with the cosine and sine in row ``position`` and column ``i`` of the tables::

    a * cos - b * sin,  b * cos + a * sin

Style ``"neox"`` pairs element ``i`` with ``i + rotary_dim / 2``, ``"interleaved"`` ``2 * i`` with ``2 * i + 1``.
Elements from ``rotary_dim`` on stay as they are. All is computed in float32 (float64 for float64) and rounded once.

q is ``[..., num_q_heads, head_dim]``, k ``[..., num_kv_heads, head_dim]``, both in ``dtype``, the last dim contiguous;
their leading dims are equal and may have any strides that fold into two, so slices of a fused projection, and
``[batch, heads, len, dim]`` seen with its middle dims swapped, are taken as they are. positions is int32 or int64,
contiguous, of the leading dims' shape; sequences of a ragged batch stand one behind the other. cos and sin are
``[max_position, rotary_dim / 2]`` in ``table_dtype`` with a contiguous last dim, see :mod:`hal_ops.rotary_embedding.
tables`. A position outside the tables is the caller's fault: it raises, or its tokens become NaN.

Without ``out`` the results are new and contiguous. ``out`` is a pair of tensors with the shapes and dtype of q and k;
``out=(q, k)`` works in place.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag, one_of, positive
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import Request, feature, required
from hal_ops._row_request import float_format
from hal_ops._traced import Traced

__all__ = ["ROTARY_EMBEDDING", "RotaryEmbeddingRequest"]


@record(frozen=True, kw_only=True)
class RotaryEmbeddingRequest(Request):
    """What a caller needs from the rotary embedding.

    Fields:
        num_q_heads: heads of q; num_kv_heads: heads of k; head_dim: elements a head.
        rotary_dim: elements a head that turn, even (default: ``head_dim``). style: ``"neox"`` or ``"interleaved"``.
        dtype: format of q and k; table_dtype: of cos and sin.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "rotary_embedding"

    num_q_heads: int = required()
    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    rotary_dim: int = required(default=None, code="head_dim")
    style: str = required(default="neox")
    dtype: str = required(default="bfloat16", code="dtype")
    table_dtype: str = feature("float32")
    deterministic: bool = feature(False)
    graph: bool = feature(False)
    needs_grad: bool = feature(False)

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        put(self, "rotary_dim", self.head_dim if self.rotary_dim is None else self.rotary_dim)
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "rotary_dim"):
            positive(name, getattr(self, name))
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim}: give an even number up to head_dim ({self.head_dim})")
        one_of("style", self.style, ("neox", "interleaved"))
        put(self, "dtype", float_format("dtype", self.dtype))
        put(self, "table_dtype", float_format("table_dtype", self.table_dtype))
        for name in ("deterministic", "graph", "needs_grad"):
            flag(name, getattr(self, name))


ROTARY_EMBEDDING = Op(
    name=RotaryEmbeddingRequest.op,
    summary="rotary position embedding of q and k",
    request=RotaryEmbeddingRequest,
    keywords={"call": ("out",)},
    reference={"call": "hal_ops.rotary_embedding.reference:rotary_embedding"},
    cases="hal_ops.rotary_embedding.cases:make_case",
    check="hal_ops.rotary_embedding.inputs:check",
    traced=Traced(
        "Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions",
        outputs="hal_ops.rotary_embedding.reference:outputs",
        results=2,
    ),
)
