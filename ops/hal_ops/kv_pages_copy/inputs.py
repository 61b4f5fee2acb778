"""What is wrong with the arguments of a copy of pages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._cache_inputs import CacheInputs
from hal_ops.kv_pages_copy.op import KvPagesCopyRequest

__all__ = ["check"]


def check(request: KvPagesCopyRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    about = CacheInputs(request, device, values)

    def problem(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> str:
        pairs = source.shape[0] if isinstance(source, Tensor) and source.dim() else 0
        return (
            about.caches(k_cache, v_cache)
            or about.numbers("source", source, pairs, torch.int64, torch.int32)
            or about.numbers("target", target, pairs, source.dtype)
            or about.below("source", source, k_cache.shape[0], "pages")
            or about.below("target", target, k_cache.shape[0], "pages")
        )

    return problem
