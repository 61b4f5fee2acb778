"""``KV_CACHE_WRITE``: tokens' keys and values go to their slots of a paged cache. Needs no torch.

``factory(request, device) -> fn`` with ::

    fn(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None) -> None

k is ``[tokens, num_kv_heads, head_dim]``, v the same with ``v_head_dim``, in ``dtype``; the caches are in ``kv_dtype``,
``[num_pages, page_size, num_kv_heads, dim]`` (NHD) or ``[num_pages, num_kv_heads, page_size, dim]`` (HND), or those of
:mod:`hal_ops.kv_layout` (HDN), and are changed in place. ``slot_mapping`` is int64 ``[tokens]``:
``page * page_size + offset``; a negative slot skips its token. A slot given twice holds either token afterwards.

An FP8 cache stores ``value / scale``, clamped to the format's largest finite value (infinities too), rounded to
nearest even; NaN stays NaN. Scales are None (1.0), or float32 tensors of one element or ``[num_kv_heads]``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hal_ops._checks import flag, one_of, positive
from hal_ops._dtypes import dtype_name, is_fp8
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import Request, feature, required
from hal_ops._traced import Traced
from hal_ops.kv_layout import KV_LAYOUTS, check_vectors

__all__ = ["KV_CACHE_WRITE", "KvCacheWriteRequest"]


@record(frozen=True, kw_only=True)
class KvCacheWriteRequest(Request):
    """What a caller needs from the write of a paged KV cache.

    Fields:
        num_kv_heads: heads of k and v; head_dim: elements a head of k; v_head_dim: those of v (default: ``head_dim``).
        dtype: format of k and v; kv_dtype: format of the cache (default: ``dtype``), exact: ``"fp8"`` is not a format.
        page_size: tokens a page. kv_layout: ``"NHD"``, ``"HND"`` or ``"HDN"``.
        kv_scale: an FP8 cache has one k and one v scale a ``"tensor"`` or a ``"head"``.
        deterministic: equal inputs give equal bits; graph: calls can be captured.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "kv_cache_write"

    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    v_head_dim: int = required(default=None, code="head_dim", plain=lambda r: r.head_dim)
    dtype: str = required(default="bfloat16", code="dtype")
    kv_dtype: str = required(default=None, code="dtype", plain=lambda r: r.dtype)
    page_size: int = required(default=16, code="page_size")
    kv_layout: str = required(default="NHD", code="layout")
    kv_scale: str = feature("tensor")
    deterministic: bool = feature(False)
    graph: bool = feature(False)

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        put(self, "v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim)
        for name in ("num_kv_heads", "head_dim", "v_head_dim", "page_size"):
            positive(name, getattr(self, name))
        put(self, "dtype", dtype_name(self.dtype))
        put(self, "kv_dtype", self.dtype if self.kv_dtype is None else dtype_name(self.kv_dtype))
        one_of("kv_layout", self.kv_layout, KV_LAYOUTS)
        check_vectors(self.kv_layout, self.head_dim, self.kv_dtype)
        one_of("kv_scale", self.kv_scale, ("tensor", "head"))
        for name in ("deterministic", "graph"):
            flag(name, getattr(self, name))
        if self.kv_scale == "head" and not is_fp8(self.kv_dtype):
            raise ValueError(f"kv_scale='head' needs an FP8 cache; kv_dtype is {self.kv_dtype}")


KV_CACHE_WRITE = Op(
    name=KvCacheWriteRequest.op,
    summary="write tokens' keys and values into the slots of a paged cache",
    request=KvCacheWriteRequest,
    keywords={"call": ("k_scale", "v_scale")},
    reference={"call": "hal_ops.kv_cache.reference:write"},
    cases="hal_ops.kv_cache.cases:make_case",
    check="hal_ops.kv_cache.inputs:check",
    traced=Traced(
        "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, Tensor? k_scale=None, "
        "Tensor? v_scale=None",
        outputs="hal_ops.rows:no_outputs",
        results=0,
    ),
)
