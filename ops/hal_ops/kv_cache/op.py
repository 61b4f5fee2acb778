"""The contract of writing k and v into the pages of a cache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hal_ops._dtypes import dtype_name
from hal_ops._op import Op
from hal_ops._request import Request, feature, required

__all__ = ["KV_CACHE_WRITE", "KvCacheWriteRequest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvCacheWriteRequest(Request):
    """What a caller needs from a cache write. The fields mean what they mean in ``AttentionRequest``."""

    op: ClassVar[str] = "kv_cache_write"

    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    v_head_dim: int = required(default=None, code="head_dim")
    dtype: str = required(default="bfloat16", code="dtype")
    kv_dtype: str = required(default=None, code="dtype")
    page_size: int = required(default=16, code="page_size")
    kv_layout: str = required(default="NHD", code="layout")
    kv_scale: str = feature("tensor")
    deterministic: bool = feature(False)
    graph: bool = feature(False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim)
        put(self, "dtype", dtype_name(self.dtype))
        put(self, "kv_dtype", self.dtype if self.kv_dtype is None else dtype_name(self.kv_dtype))


KV_CACHE_WRITE = Op(
    name="kv_cache_write",
    summary="write k and v into pages by slot mapping, scaled and rounded for FP8 caches",
    request=KvCacheWriteRequest,
    keywords={"call": ("k_scale", "v_scale")},
    reference={"call": "hal_ops.kv_cache.reference:call"},
    cases="hal_ops.kv_cache.cases:make_case",
)
