"""The oracle of the copy of pages: pair by pair. Any device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hal_ops.kv_pages_copy.op import KvPagesCopyRequest

__all__ = ["kv_pages_copy"]


def kv_pages_copy(request: KvPagesCopyRequest, device: object) -> Callable[..., None]:
    """The ``call`` phase."""
    del request, device

    def call(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        for at, to in zip(source.tolist(), target.tolist(), strict=True):
            if at >= 0 and to >= 0:
                for cache in (k_cache, v_cache):
                    cache[to].copy_(cache[at])

    return call
