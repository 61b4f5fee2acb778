"""``KV_PAGES_COPY``: pages of a cache are copied to others, as to fork a sequence. Needs no torch.

``factory(request, device) -> fn`` with ``fn(k_cache, v_cache, source, target) -> None``: page ``source[i]`` of each cache
is copied to page ``target[i]``, bit by bit, in place. The caches are ``[num_pages, page_size, num_kv_heads, dim]`` (NHD)
or ``[num_pages, num_kv_heads, page_size, dim]`` (HND) in ``kv_dtype``, of any strides with a contiguous last dim. source
and target are int32 or int64 ``[pages]`` on the cache's device; a pair with a negative page is skipped. A page may be
read many times; one that is written may not be read or written by another pair.
"""

from __future__ import annotations

from typing import ClassVar

from hal_ops._cache_request import PagesRequest
from hal_ops._op import Op
from hal_ops._record import record
from hal_ops._traced import Traced

__all__ = ["KV_PAGES_COPY", "KvPagesCopyRequest"]


@record(frozen=True, kw_only=True)
class KvPagesCopyRequest(PagesRequest):
    """What a caller needs from the copy of pages; see :class:`hal_ops._cache_request.PagesRequest`."""

    op: ClassVar[str] = "kv_pages_copy"


KV_PAGES_COPY = Op(
    name=KvPagesCopyRequest.op,
    summary="copy pages of a paged KV cache to other pages of it",
    request=KvPagesCopyRequest,
    reference={"call": "hal_ops.kv_pages_copy.reference:kv_pages_copy"},
    cases="hal_ops.kv_pages_copy.cases:make_case",
    check="hal_ops.kv_pages_copy.inputs:check",
    traced=Traced(
        "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor source, Tensor target",
        outputs="hal_ops.rows:no_outputs",
        results=0,
    ),
)
