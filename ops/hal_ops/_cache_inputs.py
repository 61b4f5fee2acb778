"""The arguments that ops over the pages of a KV cache share: what is wrong with them, as a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_ops._call_inputs import gaps, mismatch, numbers, shown
from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.kv_layout import VECTORS, page_shapes

__all__ = ["CacheInputs"]


class CacheInputs:
    """The part of a request that says what its caches are.

    Args:
        request: with the fields of :class:`hal_ops._cache_request.PagesRequest`, and ``kv_scale`` if there are scales.
        device: where the tensors have to be.
        values: numbers in tensors on accelerators are read too, which waits for the device.
    """

    def __init__(self, request: Any, device: torch.device, values: bool) -> None:
        self.device, self.page_size, self.layout = device, request.page_size, request.kv_layout
        self.reads = values or device.type == "cpu"
        self._dtype, self._fp8 = torch_dtype(request.kv_dtype), is_fp8(request.kv_dtype)
        sizes = (request.page_size, request.num_kv_heads, request.head_dim, request.v_head_dim)
        self._shapes = page_shapes(request.kv_layout, *sizes, request.kv_dtype)
        self._scales = request.num_kv_heads if getattr(request, "kv_scale", "tensor") == "head" else 1

    def caches(self, k_cache: object, v_cache: object) -> str:
        """Both caches: sizes, format, place, and by strides the layout."""
        pages = k_cache.shape[0] if isinstance(k_cache, Tensor) and k_cache.dim() else 0
        for name, cache, shape in (("k_cache", k_cache, self._shapes[0]), ("v_cache", v_cache, self._shapes[1])):
            wrong = mismatch(name, cache, (pages, *shape), self._dtype, self.device)
            if wrong:
                return f"{wrong} (layout {self.layout}, page_size {self.page_size})"
            assert isinstance(cache, Tensor)
            strides = cache.stride()
            if strides[-1] != 1 and shape[-1] > 1:
                return f"{name}'s last stride is {strides[-1]}, not 1"
            if self.layout != VECTORS and strides[1] < strides[2] and min(shape[:2]) > 1:
                other = "HND" if self.layout == "NHD" else "NHD"
                return f"{name} is bound as {self.layout}, and its strides {strides} are those of {other} memory"
        return ""

    def scales(self, k_scale: object, v_scale: object) -> str:
        """The scales: only an FP8 cache has any."""
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is None:
                continue
            if not self._fp8:
                return f"{name} is given, and the cache is {self._dtype}: only FP8 caches are scaled"
            fits = isinstance(scale, Tensor) and scale.numel() == self._scales
            if not fits or mismatch(name, scale, scale.shape, torch.float32, self.device):  # type: ignore[attr-defined]
                return f"{name} is {shown(scale)}, and should be float32 with {self._scales} values on {self.device}"
            assert isinstance(scale, Tensor)
            wrong = gaps(name, scale)
            if wrong:
                return wrong
        return ""

    def numbers(self, name: str, x: object, count: int, *dtypes: torch.dtype) -> str:
        """``count`` whole numbers in a contiguous tensor of one dim."""
        return numbers(name, x, (count,), self.device, *dtypes)

    def below(self, name: str, x: Tensor, limit: int, what: str) -> str:
        """Numbers under a limit, where they are read."""
        if not self.reads or not x.numel() or int(x.max()) < limit:
            return ""
        return f"{name}[{int(x.argmax())}] is {int(x.max())}, and the cache has {limit} {what}"
