"""``KV_PAGES_GATHER``: the keys and values of rows out of a paged cache, one row behind the other. Needs no torch.

``factory(request, device) -> fn`` with ::

    fn(k_cache, v_cache, block_table, cu_seqlens, total, longest, *, k_scale=None, v_scale=None, out=None) -> (k, v)

The caches are ``[num_pages, page_size, num_kv_heads, dim]`` (NHD) or ``[num_pages, num_kv_heads, page_size, dim]`` (HND)
in ``kv_dtype``; block_table is int32 ``[rows, max_pages]`` with a contiguous last dim, whose entries past a row's last
page may hold anything; cu_seqlens is int32 ``[rows + 1]``, contiguous, in tokens, from 0 to the sum; total is that sum
and longest the tokens of the longest row, both host numbers, so that nothing waits for the device.

Returns k ``[total, num_kv_heads, head_dim]`` and v with ``v_head_dim``, in ``dtype``, contiguous; or ``out``, a pair of
that shape and dtype, contiguous. What an FP8 cache holds is multiplied by the scales: None (1.0), or float32 tensors of
one element or ``[num_kv_heads]``.
"""

from __future__ import annotations

from typing import ClassVar

from hal_ops._cache_request import PagesRequest
from hal_ops._checks import one_of
from hal_ops._dtypes import is_fp8
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._request import feature, required
from hal_ops._row_request import float_format
from hal_ops._traced import Traced

__all__ = ["KV_PAGES_GATHER", "KvPagesGatherRequest"]


@record(frozen=True, kw_only=True)
class KvPagesGatherRequest(PagesRequest):
    """What a caller needs from the gather of rows; see :class:`hal_ops._cache_request.PagesRequest` too.

    Fields:
        dtype: format of what is gathered (default: ``kv_dtype``, or bfloat16 for an FP8 cache).
        kv_scale: an FP8 cache has one k and one v scale a ``"tensor"`` or a ``"head"``.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "kv_pages_gather"

    dtype: str = required(default=None, code="dtype")
    kv_scale: str = feature("tensor")

    def __post_init__(self) -> None:
        super().__post_init__()
        fp8 = is_fp8(self.kv_dtype)
        dtype = self.dtype or ("bfloat16" if fp8 else self.kv_dtype)
        object.__setattr__(self, "dtype", float_format("dtype", dtype))
        one_of("kv_scale", self.kv_scale, ("tensor", "head"))
        if self.kv_scale == "head" and not fp8:
            raise ValueError(f"kv_scale='head' needs an FP8 cache; kv_dtype is {self.kv_dtype}")


KV_PAGES_GATHER = Op(
    name=KvPagesGatherRequest.op,
    summary="the keys and values of rows out of a paged KV cache, one row behind the other",
    request=KvPagesGatherRequest,
    keywords={"call": ("k_scale", "v_scale", "out")},
    reference={"call": "hal_ops.kv_pages_gather.reference:kv_pages_gather"},
    cases="hal_ops.kv_pages_gather.cases:make_case",
    check="hal_ops.kv_pages_gather.inputs:check",
    traced=Traced(
        "Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens, SymInt total, SymInt longest, *, "
        "Tensor? k_scale=None, Tensor? v_scale=None",
        outputs="hal_ops.kv_pages_gather.reference:outputs",
        results=2,
    ),
)
