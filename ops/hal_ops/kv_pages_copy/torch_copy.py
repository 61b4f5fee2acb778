"""The copy of pages by torch's indexing. Any device.

What :func:`kv_pages_copy` honours: every format, any heads, dims and page size, both layouts, caches of any strides;
deterministic; graph: nothing waits for the device or depends on values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8
from hal_ops.kv_pages_copy.op import KvPagesCopyRequest
from hal_ops.skipping import repeating

__all__ = ["kv_pages_copy"]


def kv_pages_copy(request: KvPagesCopyRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase."""
    fp8 = is_fp8(request.kv_dtype)

    def call(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        if source.shape != target.shape:
            raise ValueError(f"source has {len(source)} pages, target {len(target)}: they are pairs")
        if not len(source):
            return
        # A skipped pair repeats one that is not skipped; where all are, a page is given what it holds.
        pair, some = repeating(torch.minimum(source, target))
        to = target[pair].clamp_min(0).long()
        at = torch.where(some, source[pair].clamp_min(0).long(), to)
        for cache in (k_cache, v_cache):
            bits = cache.view(torch.uint8) if fp8 else cache  # torch 2.6.0 cannot index FP8
            bits[to] = bits[at]

    return call
