"""``ROTARY_KV_CACHE_WRITE``: q and k are turned by their positions, k and v go to their slots. Needs no torch.

``factory(request, device) -> fn`` with ::

    fn(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None, out=None) -> q

The same as ``rotary_embedding`` followed by ``kv_cache_write`` of the turned k, see :mod:`hal_ops.rotary_embedding.op`
and :mod:`hal_ops.kv_cache.op`: keys are rounded to their own format, then to the cache's. q ``[tokens, num_q_heads,
head_dim]``, k with ``num_kv_heads``, v with ``v_head_dim`` too, in ``dtype``; the last dim is contiguous, the others may
be views of a fused projection. cos and sin ``[max_position, rotary_dim / 2]`` in ``table_dtype``; positions int32 or
int64 ``[tokens]``, contiguous; the caches in ``kv_dtype``, changed in place; slot_mapping int64 ``[tokens]``. A token
whose slot is negative is not written, and its q is turned. A position outside the tables is the caller's fault: it
raises, or what it turns becomes NaN.

Returns the turned q: new and contiguous, or ``out``, which has q's shape and dtype; ``out=q`` works in place. k and v
stay as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag, one_of, positive
from hal_ops._dtypes import dtype_name, is_fp8
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import Request, feature, required
from hal_ops._row_request import float_format
from hal_ops._traced import Traced
from hal_ops.kv_cache.op import KvCacheWriteRequest
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest

__all__ = ["ROTARY_KV_CACHE_WRITE", "RotaryKvCacheWriteRequest"]

_CACHE = (
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "dtype",
    "kv_dtype",
    "page_size",
    "kv_layout",
    "kv_scale",
    "deterministic",
    "graph",
)
_ROTARY = (
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
    "rotary_dim",
    "style",
    "dtype",
    "table_dtype",
    "deterministic",
    "graph",
)


@record(frozen=True, kw_only=True)
class RotaryKvCacheWriteRequest(Request):
    """What a caller needs from the rotary embedding with the cache write.

    Fields:
        num_q_heads: heads of q; num_kv_heads: of k and v; head_dim: elements a head of q and k; v_head_dim: those of v
            (default: ``head_dim``).
        rotary_dim: elements a head that turn, even (default: ``head_dim``). style: ``"neox"`` or ``"interleaved"``.
        dtype: format of q, k and v; kv_dtype: of the cache (default: ``dtype``), exact; table_dtype: of cos and sin.
        page_size: tokens a page. kv_layout: ``"NHD"`` or ``"HND"``.
        kv_scale: an FP8 cache has one k and one v scale a ``"tensor"`` or a ``"head"``.
        deterministic: equal inputs give equal bits; graph: calls can be captured.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "rotary_kv_cache_write"

    num_q_heads: int = required()
    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    v_head_dim: int = required(default=None, code="head_dim", plain=lambda r: r.head_dim)
    rotary_dim: int = required(default=None, code="head_dim")
    style: str = required(default="neox")
    dtype: str = required(default="bfloat16", code="dtype")
    kv_dtype: str = required(default=None, code="dtype", plain=lambda r: r.dtype)
    page_size: int = required(default=16, code="page_size")
    kv_layout: str = required(default="NHD", code="layout")
    kv_scale: str = feature("tensor")
    table_dtype: str = feature("float32")
    deterministic: bool = feature(False)
    graph: bool = feature(False)

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        for name in ("v_head_dim", "rotary_dim"):
            put(self, name, self.head_dim if getattr(self, name) is None else getattr(self, name))
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim", "rotary_dim", "page_size"):
            positive(name, getattr(self, name))
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim}: give an even number up to head_dim ({self.head_dim})")
        put(self, "dtype", float_format("dtype", self.dtype))
        put(self, "kv_dtype", self.dtype if self.kv_dtype is None else dtype_name(self.kv_dtype))
        put(self, "table_dtype", float_format("table_dtype", self.table_dtype))
        one_of("style", self.style, ("neox", "interleaved"))
        one_of("kv_layout", self.kv_layout, ("NHD", "HND"))
        one_of("kv_scale", self.kv_scale, ("tensor", "head"))
        for name in ("deterministic", "graph"):
            flag(name, getattr(self, name))
        if self.kv_scale == "head" and not is_fp8(self.kv_dtype):
            raise ValueError(f"kv_scale='head' needs an FP8 cache; kv_dtype is {self.kv_dtype}")

    def write(self) -> KvCacheWriteRequest:
        """The part that is a cache write."""
        return KvCacheWriteRequest(**{name: getattr(self, name) for name in _CACHE})

    def rotary(self) -> RotaryEmbeddingRequest:
        """The part that is a rotary embedding."""
        return RotaryEmbeddingRequest(**{name: getattr(self, name) for name in _ROTARY})


ROTARY_KV_CACHE_WRITE = Op(
    name=RotaryKvCacheWriteRequest.op,
    summary="rotary position embedding of q and k, and the write of k and v into a paged cache, in one pass",
    request=RotaryKvCacheWriteRequest,
    keywords={"call": ("k_scale", "v_scale", "out")},
    reference={"call": "hal_ops.rotary_kv_cache_write.reference:rotary_kv_cache_write"},
    cases="hal_ops.rotary_kv_cache_write.cases:make_case",
    check="hal_ops.rotary_kv_cache_write.inputs:check",
    traced=Traced(
        "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, "
        "Tensor(b!) v_cache, Tensor slot_mapping, *, Tensor? k_scale=None, Tensor? v_scale=None",
        outputs="hal_ops.rotary_kv_cache_write.reference:outputs",
    ),
)
