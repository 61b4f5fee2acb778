"""``KVCache``: the paged K and V of one layer, with layout, format and scales as named properties."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import check_tensor, count
from hal.errors import InputError
from hal_ops import dtype_name, is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest
from hal_ops.kv_layout import KV_LAYOUTS, VECTORS, by_token, page_shapes, vector_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["KVCache", "allocate", "plain", "scale_of"]


_TINY, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The normal numbers of float32: a smaller one is 0 to some devices."""


class KVCache:
    """K and V pages of one layer.

    ``k`` and ``v`` are ``[num_pages, page_size, num_kv_heads, dim]`` (layout ``"NHD"``) or
    ``[num_pages, num_kv_heads, page_size, dim]`` (``"HND"``), in one dtype, on one device. In layout ``"HDN"`` ``v`` is
    ``[num_pages, num_kv_heads, dim, page_size]`` and ``k`` ``[num_pages, num_kv_heads, dim / x, page_size, x]``, where
    x elements are 16 bytes. In an FP8 cache the values are stored divided by ``k_scale`` and ``v_scale``: float32
    tensors of one element, or one a kv head.

    An engine that owns its memory wraps views of it: ``KVCache(k, v, layout="NHD")``. The layout is checked against
    shape and strides when the cache is first used by a handle; it is never guessed.
    """

    __slots__ = ("_checked_by", "k", "k_scale", "layout", "v", "v_scale")

    def __init__(self, k: Tensor, v: Tensor, *, layout: str, k_scale: Any = None, v_scale: Any = None) -> None:
        """Wrap existing tensors.

        Args:
            k, v: the pages, see above.
            layout: ``"NHD"``, ``"HND"`` or ``"HDN"``.
            k_scale, v_scale: for FP8 formats: a number, a tensor of one element, or of ``num_kv_heads``. All are finite
                and above 0; what is on a device is not read.

        Raises:
            InputError: an unknown layout, tensors that do not match, a scale where there is none, or one that nothing can be
                divided by.
        """
        check_tensor("k", k)
        check_tensor("v", v)
        if layout not in KV_LAYOUTS:
            raise InputError(f"layout={layout!r}: choose 'NHD', 'HND' or 'HDN'")
        if k.dtype != v.dtype or k.device != v.device:
            raise InputError(
                f"k is {k.dtype} on {k.device}, v is {v.dtype} on {v.device}: a cache has one dtype and device"
            )
        _check_shapes(k, v, layout)
        self.k: Tensor = k
        self.v: Tensor = v
        self.layout: str = layout
        self.k_scale: Tensor | None = self._scale("k_scale", k_scale)
        self.v_scale: Tensor | None = self._scale("v_scale", v_scale)
        self._checked_by: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("k", "v", "layout", "k_scale", "v_scale")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is no handle's yet: the first that meets it checks it."""
        for name, value in state.items():
            setattr(self, name, value)
        self._checked_by = None

    def _scale(self, name: str, value: Any) -> Tensor | None:
        if not is_fp8(self.dtype):
            if value is not None:
                raise InputError(f"{name} is given, and the cache is {self.dtype}: only FP8 caches are scaled")
            return None
        scale = scale_of(name, value, self.k.device)
        if scale.numel() not in (1, self.num_kv_heads):
            raise InputError(f"{name} has {scale.numel()} values: give one, or one a kv head ({self.num_kv_heads})")
        return scale.contiguous()

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return int(self.k.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(by_token(self.v, self.layout).shape[1])

    @property
    def num_kv_heads(self) -> int:
        """Heads of k and v."""
        return int(by_token(self.v, self.layout).shape[2])

    @property
    def dims(self) -> tuple[int, int]:
        """Elements a head of k and of v."""
        k, v = (math.prod(by_token(x, self.layout).shape[3:]) for x in (self.k, self.v))
        return k, v

    @property
    def dtype(self) -> str:
        """Exact name of the storage format."""
        return dtype_name(self.k.dtype)

    def __repr__(self) -> str:
        return (
            f"KVCache({self.num_pages} pages of {self.page_size}, {self.num_kv_heads} kv heads, "
            f"dims {'/'.join(map(str, self.dims))}, {self.dtype}, {self.layout}, {self.k.device})"
        )


def scale_of(name: str, value: Any, device: torch.device) -> Tensor:
    """The scales of an FP8 cache in one dim, float32 on its device; None is 1. What the host has of them is checked.

    Raises:
        InputError: they are no numbers, or one is not finite or not above 0 in float32.
    """
    import torch

    given = 1.0 if value is None else value
    if not isinstance(given, torch.Tensor):
        try:
            given = torch.as_tensor(given, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"{name}={value!r}: give a number, or a tensor of them ({error})") from error
    scale = given.to(device, torch.float32).reshape(-1)
    if not all(_TINY <= x <= _LARGEST for x in _numbers(value, given)):
        raise InputError(f"{name}={value!r}: entries are stored divided by it: give finite numbers above 0")
    return scale


def _numbers(value: Any, tensor: Tensor) -> list[float]:
    """What is given, as far as nothing has to be waited for, or made up by a compiler, to know it."""
    import torch

    if value is None or isinstance(value, (int, float)):
        return [1.0 if value is None else value]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return []
    return [float(x) for x in tensor.reshape(-1).tolist()]


def _check_shapes(k: Tensor, v: Tensor, layout: str) -> None:
    shapes = f"k {tuple(k.shape)} and v {tuple(v.shape)}"
    if layout != VECTORS:
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise InputError(f"{shapes} must have 4 dims and differ in the last one at most")
        return
    x = vector_of(dtype_name(k.dtype))
    if k.dim() != 5 or v.dim() != 4 or k.shape[:2] != v.shape[:2] or (k.shape[3], k.shape[4]) != (v.shape[3], x):
        raise InputError(
            f"{shapes} must be [num_pages, num_kv_heads, dim / {x}, page_size, {x}] and [num_pages, num_kv_heads, dim, "
            f"page_size]: layout {layout!r} keeps {k.dtype} keys in vectors of 16 bytes, {x} elements"
        )


def plain(k: Tensor, v: Tensor, layout: str, k_scale: Tensor | None, v_scale: Tensor | None) -> KVCache:
    """The tensors of a cache as one again, without any check."""
    cache = KVCache.__new__(KVCache)
    cache.k, cache.v, cache.layout = k, v, layout
    cache.k_scale, cache.v_scale, cache._checked_by = k_scale, v_scale, None
    return cache


def allocate(request: AttentionRequest, num_pages: int, device: torch.device, k_scale: Any, v_scale: Any) -> KVCache:
    """A cache for a decided request, zero-filled."""
    import torch

    num_pages = count("num_pages", num_pages)
    shapes = page_shapes(
        request.kv_layout,
        int(request.page_size),
        request.num_kv_heads,
        request.head_dim,
        request.v_head_dim,
        request.kv_dtype,
    )
    bits = torch.uint8 if is_fp8(request.kv_dtype) else torch_dtype(request.kv_dtype)
    k, v = (torch.zeros((num_pages, *shape), dtype=bits, device=device) for shape in shapes)
    if is_fp8(request.kv_dtype):
        k, v = k.view(torch_dtype(request.kv_dtype)), v.view(torch_dtype(request.kv_dtype))
    return KVCache(k, v, layout=request.kv_layout, k_scale=k_scale, v_scale=v_scale)


def problems(cache: KVCache, request: AttentionRequest, device: torch.device) -> list[str]:
    """Why a cache does not suit a decided request; empty when it does."""
    found = []
    wanted = {
        "layout": request.kv_layout,
        "dtype": request.kv_dtype,
        "page_size": request.page_size,
        "num_kv_heads": request.num_kv_heads,
    }
    found += [f"{n} is {getattr(cache, n)}, not {value}" for n, value in wanted.items() if getattr(cache, n) != value]
    dims = zip(("k", "v"), (cache.k, cache.v), cache.dims, (request.head_dim, request.v_head_dim), strict=True)
    for name, tensor, given, dim in dims:
        if given != dim:
            found.append(f"{name} has dim {given}, not {dim}")
        found += _stride_problems(name, tensor, cache.layout)
        if tensor.device != device:
            found.append(f"{name} is on {tensor.device}, not on {device}")
    if is_fp8(request.kv_dtype):
        found += _scale_problems(cache, request)
    return found


def _stride_problems(name: str, tensor: Tensor, layout: str) -> list[str]:
    """A layout is an order of strides: one that is not falling belongs to memory of the other layout."""
    strides = tensor.stride()
    if layout == VECTORS:
        return _gaps(name, tensor)
    if strides[3] != 1:
        return [f"{name}'s last stride is {strides[3]}, not 1"]
    sizes = tensor.shape
    if sizes[1] > 1 and sizes[2] > 1 and strides[1] < strides[2]:
        other = "HND" if layout == "NHD" else "NHD"
        return [f"{name} is called {layout}, and its strides {strides} are those of {other} memory"]
    return far_slots(name, sizes[1], strides[1]) if layout == "NHD" else []


def far_slots(name: str, page_size: int, stride: int) -> list[str]:
    """That the tokens of a page lie further apart than the kernels of attention count: 32 bits, in their inner loops."""
    if (page_size - 1) * stride < 1 << 31:
        return []
    return [f"{name}'s tokens lie {stride} elements apart: the {page_size} of a page must lie within 2**31 elements"]


def _gaps(name: str, tensor: Tensor) -> list[str]:
    """What a head has in a page is one piece of memory where elements lie in vectors."""
    wanted = tensor[:1, :1].contiguous().stride()[2:]
    sizes = tensor.shape[2:]
    found = tensor.stride()[2:]
    if any(n > 1 and have != want for n, have, want in zip(sizes, found, wanted, strict=True)):
        return [f"{name}'s strides {tensor.stride()} leave gaps within a head's part of a page: they end in {wanted}"]
    return []


def _scale_problems(cache: KVCache, request: AttentionRequest) -> list[str]:
    wanted = 1 if request.kv_scale == "tensor" else request.num_kv_heads
    return [
        f"{name} has {scale.numel()} values, and the request says kv_scale={request.kv_scale!r}"
        for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale))
        if scale is not None and scale.numel() != wanted
    ]
