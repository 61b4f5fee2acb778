"""The named layouts of a paged KV cache: their shapes, and each seen token by token.

N is a page's tokens, H the kv heads, D the elements of a head; K and V are ``[num_pages, ...]``:

* ``"NHD"``: ``[page_size, num_kv_heads, dim]``. ``"HND"``: ``[num_kv_heads, page_size, dim]``.
* ``"HDN"``: V is ``[num_kv_heads, dim, page_size]``; K is ``[num_kv_heads, dim / x, page_size, x]``, where x elements
  are 16 bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KV_LAYOUTS", "VECTORS", "arranged", "by_token", "check_vectors", "page_shapes", "vector_of"]

KV_LAYOUTS = ("NHD", "HND", "HDN")
VECTORS = "HDN"
"""The layout whose keys lie in vectors, and whose elements of a head are apart."""
_VECTOR_BYTES = 16


def vector_of(kv_dtype: str) -> int:
    """Elements of a vector of K in the layout ``"HDN"``."""
    bits = re.search(r"\d+", kv_dtype)
    return _VECTOR_BYTES * 8 // int(bits[0]) if bits else 1


def check_vectors(layout: str, head_dim: int, kv_dtype: str) -> None:
    """Whether keys of a layout that has vectors are a whole number of them.

    Raises:
        ValueError: they are not.
    """
    x = vector_of(kv_dtype) if layout == VECTORS else 1
    if head_dim % x:
        raise ValueError(
            f"kv_layout={layout!r} keeps keys in vectors of 16 bytes: head_dim={head_dim} is no multiple of the {x} "
            f"elements of {kv_dtype} in one"
        )


def page_shapes(
    layout: str, page_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int, kv_dtype: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a page of K and of V."""
    if layout == VECTORS:
        x = vector_of(kv_dtype)
        return (num_kv_heads, head_dim // x, page_size, x), (num_kv_heads, v_head_dim, page_size)
    rows = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
    return (*rows, head_dim), (*rows, v_head_dim)


def by_token(cache: Tensor, layout: str) -> Tensor:
    """A view ``[num_pages, page_size, num_kv_heads, dim]``; K in ``"HDN"`` has two dims for the last one."""
    if layout == VECTORS:
        return cache.movedim(3, 1)
    return cache.transpose(1, 2) if layout == "HND" else cache


def arranged(pages: Tensor, layout: str, vector: int = 1) -> Tensor:
    """Pages ``[num_pages, page_size, num_kv_heads, dim]`` in the memory order of a layout.

    ``vector`` is that of K in ``"HDN"``, see :func:`vector_of`; V has none.
    """
    if layout == VECTORS:
        parts = pages.reshape(*pages.shape[:3], -1, vector) if vector > 1 else pages
        return parts.movedim(1, 3).contiguous()
    return pages.transpose(1, 2).contiguous() if layout == "HND" else pages
