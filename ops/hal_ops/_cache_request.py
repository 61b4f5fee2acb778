"""What requests of ops over the pages of a KV cache share."""

from __future__ import annotations

from typing import Any

from hal_ops._checks import flag, one_of, positive
from hal_ops._dtypes import dtype_name
from hal_ops._record import record
from hal_ops._request import Request, feature, required

__all__ = ["PagesRequest"]


@record(frozen=True, kw_only=True)
class PagesRequest(Request):
    """The cache of one layer, and the properties of the call.

    Fields:
        num_kv_heads: heads of K and V; head_dim: elements a head of K; v_head_dim: those of V (default: ``head_dim``).
        kv_dtype: format of the cache, exact: ``"fp8"`` is not a format.
        page_size: tokens a page. kv_layout: ``"NHD"`` or ``"HND"``.
        deterministic: equal inputs give equal bits; graph: calls can be captured.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    v_head_dim: int = required(default=None, code="head_dim", plain=lambda r: r.head_dim)
    kv_dtype: str = required(default="bfloat16", code="dtype")
    page_size: int = required(default=16, code="page_size")
    kv_layout: str = required(default="NHD", code="layout")
    deterministic: bool = feature(False)
    graph: bool = feature(False)

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        put(self, "v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim)
        for name in ("num_kv_heads", "head_dim", "v_head_dim", "page_size"):
            positive(name, getattr(self, name))
        put(self, "kv_dtype", dtype_name(self.kv_dtype))
        one_of("kv_layout", self.kv_layout, ("NHD", "HND"))
        for name in ("deterministic", "graph"):
            flag(name, getattr(self, name))
