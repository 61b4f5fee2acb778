"""The size of flash-attention 3's scheduler metadata, by ``hopper/flash_api.cpp`` since 2025-08-21 (#1823).

int32 ``[vectors * ceil4(batch) + semaphore]``: two vectors of one number a row (splits, query blocks), a third where
rows are sorted by length (all but windows), a fourth where heads are ordered for the cache (causal, or windows); one
more number counts finished tiles. The library compares the size for equality.
"""

from __future__ import annotations

from collections.abc import Collection

from hal_ops.attention import AttentionRequest

__all__ = ["check_size", "metadata_sizes"]


def metadata_sizes(
    request: AttentionRequest, batch: int, max_seqlen_q: int, max_seqlen_k: int, *, hopper: bool
) -> frozenset[int]:
    """Sizes that a step's metadata may have: one on sm_90; on sm_80 the tile count is there only if rows are split."""
    left, right = request.window
    left = None if left is None or left >= max_seqlen_k - 1 else left
    right = None if right is None or right >= max_seqlen_q - 1 else right
    causal = request.causal
    if max_seqlen_q == 1 and left is None and right is None and not 64 < request.head_dim <= 128:
        causal = False
    right = 0 if causal else right
    plainly_causal = left is None and right == 0
    local = not plainly_causal and (left is not None or right is not None)
    vectors = 2 + (not local) + (plainly_causal or local)
    rows = -(-batch // 4) * 4
    return frozenset({vectors * rows + 1} if hopper else {vectors * rows, vectors * rows + 1})


def check_size(found: int, wanted: Collection[int], about: str) -> None:
    """Raise unless metadata has a size that the launch will accept.

    Raises:
        ValueError: naming both sizes and the step.
    """
    if found not in wanted:
        sizes = " or ".join(map(str, sorted(wanted)))
        raise ValueError(
            f"flash-attention 3's planner made scheduler metadata of {found} numbers for {about}, and the launch takes "
            f"{sizes}: this build has another layout than 2025-08-21 to 2026-08-15; force another library "
            "(HAL_ATTENTION=...) and report the build"
        )
