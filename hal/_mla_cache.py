"""``MlaCache``: the paged latents of one layer; and the checks of what comes with it to a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import check_tensor, count
from hal._kv_cache import far_slots, scale_of
from hal._rows import check_rows
from hal.errors import InputError
from hal_ops import dtype_name, is_fp8, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from hal._mla import MlaAttention

__all__ = ["MlaCache", "allocate"]


class MlaCache:
    """The paged latents of one layer: ``data`` is ``[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]``.

    An entry is a token's latent, then its rotated key. In an FP8 cache both are stored divided by ``kv_scale``, a float32
    tensor of one element. An engine that owns its memory wraps a view of it.
    """

    __slots__ = ("_checked_by", "_parts", "data", "kv_scale")

    def __init__(self, data: Tensor, *, kv_scale: Any = None) -> None:
        """Wrap an existing tensor.

        Args:
            data: the pages.
            kv_scale: for FP8 formats: a number or a tensor of one element, finite and above 0; default 1.

        Raises:
            InputError: it does not have three dims, its entries are not contiguous, or a scale does not fit.
        """
        check_tensor("data", data)
        if data.dim() != 3:
            raise InputError(f"the cache is {tuple(data.shape)}: give [num_pages, page_size, kv_lora_rank + rope]")
        if data.stride(2) != 1:
            raise InputError(f"the cache's last stride is {data.stride(2)}: entries must be contiguous")
        self.data: Tensor = data
        self.kv_scale: Tensor | None = self._scale(kv_scale)
        self._checked_by: Any = None
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "kv_scale": self.kv_scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is no handle's yet: the first that meets it checks it."""
        self.data, self.kv_scale = state["data"], state["kv_scale"]
        self._checked_by = self._parts = None

    def parts(self, rank: int) -> tuple[Tensor, Tensor]:
        """Latents and rotated keys as pages of one head, ``[num_pages, page_size, 1, dim]``: views, made once."""
        kept = self._parts
        if kept is None or kept[0] is not self.data:
            pages = self.data.unsqueeze(2)
            kept = self._parts = self.data, pages[..., :rank], pages[..., rank:]
        return kept[1], kept[2]

    def _scale(self, value: Any) -> Tensor | None:
        if not is_fp8(self.dtype):
            if value is not None:
                raise InputError(f"kv_scale is given, and the cache is {self.dtype}: only FP8 caches are scaled")
            return None
        scale = scale_of("kv_scale", value, self.data.device)
        if scale.numel() != 1:
            raise InputError(f"kv_scale has {scale.numel()} values: give one, for latents and rotated keys together")
        return scale

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return int(self.data.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(self.data.shape[1])

    @property
    def dtype(self) -> str:
        """Exact name of the storage format."""
        return dtype_name(self.data.dtype)

    def __repr__(self) -> str:
        entry = self.data.shape[2]
        return (
            f"MlaCache({self.num_pages} pages of {self.page_size}, {entry} a token, {self.dtype}, {self.data.device})"
        )


def allocate(handle: MlaAttention, num_pages: int, kv_scale: Any) -> MlaCache:
    """A zero-filled cache of a handle's format. torch 2.6.0 fills none of FP8: its zeros are bytes."""
    import torch

    num_pages = count("num_pages", num_pages)
    format_ = torch_dtype(handle.request.kv_dtype)
    size = (num_pages, int(handle.request.page_size), handle.request.entry_dim)
    stored = torch.uint8 if is_fp8(handle.request.kv_dtype) else format_
    return MlaCache(torch.zeros(size, dtype=stored, device=handle._torch_device).view(format_), kv_scale=kv_scale)


def check_cache(handle: MlaAttention, cache: MlaCache) -> None:
    """A cache against the request: format and sizes."""
    request = handle.request
    wanted = {"page_size": request.page_size, "dtype": request.kv_dtype}
    found = [f"{n} is {getattr(cache, n)}, not {value}" for n, value in wanted.items() if getattr(cache, n) != value]
    if cache.data.shape[2] != request.entry_dim:
        found.append(f"an entry has {cache.data.shape[2]} elements, not {request.entry_dim}")
    found += far_slots("data", cache.page_size, cache.data.stride(1))
    if cache.data.device != handle._torch_device:
        found.append(f"it is on {cache.data.device}, not on {handle._torch_device}")
    if found:
        raise InputError(f"the cache does not fit this handle: {'; '.join(found)}")
    check_rows(handle._strictest, {"data": cache.data})


def check_tensors(handle: MlaAttention, tensors: Mapping[str, Tensor], sizes: Sequence[int]) -> None:
    """q and latents of a step, before anything is written; ``sizes`` are the numbers of tokens that they may have."""
    import torch

    entry = handle.request.entry_dim
    wanted = {"q": (handle.request.num_q_heads, entry), "latent": (entry,)}
    for name, tensor in tensors.items():
        last = wanted[name]
        check_tensor(name, tensor)
        if tensor.dim() != len(last) + 1 or tuple(tensor.shape[1:]) != last:
            shown = ", ".join(map(str, last))
            raise InputError(f"{name} is {tuple(tensor.shape)}: give [tokens, {shown}] (latent part, then rotated)")
        if tensor.dtype != handle._dtype:
            raise InputError(f"{name} is {tensor.dtype}, and the request is {handle.request.dtype}")
        if tensor.device != handle._torch_device:
            raise InputError(f"{name} is on {tensor.device}, and the handle on {handle._torch_device}")
        if tensor.stride(-1) != 1:
            raise InputError(f"{name}'s last stride is {tensor.stride(-1)}: entries must be contiguous")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires a gradient, and latent attention has none: call it under torch.no_grad()"
            )
        if tensor.shape[0] not in sizes or tensor.shape[0] != next(iter(tensors.values())).shape[0]:
            raise InputError(
                f"{name} has {tensor.shape[0]} tokens, the plan {' or '.join(map(str, dict.fromkeys(sizes)))}"
            )
    check_rows(handle._strictest, tensors)
