"""Where the elements of a key's head lie in a cache, for Triton kernels over every layout."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hal_ops.kv_layout import VECTORS, vector_of

__all__ = ["columns_at", "vectors"]


@triton.jit
def columns_at(columns, PAGE_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of elements from the first one: side by side, or ``VECTOR`` > 0 of them together.

    A page's tokens have their first vectors side by side, then their next ones. So a token is ``VECTOR`` elements after
    the one before, and its vectors ``PAGE_SIZE * VECTOR`` apart. With 1 all tokens' first elements lie side by side.
    """
    if VECTOR > 0:
        columns = columns // VECTOR * (PAGE_SIZE * VECTOR) + columns % VECTOR
    return columns


def vectors(kv_layout: str, kv_dtype: str) -> dict[str, int]:
    """The constants ``K_VECTOR`` and ``V_VECTOR`` of kernels."""
    if kv_layout != VECTORS:
        return {"K_VECTOR": 0, "V_VECTOR": 0}
    return {"K_VECTOR": vector_of(kv_dtype), "V_VECTOR": 1}
