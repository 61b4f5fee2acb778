"""The work of an attention call, by which times become rates: products and sums, and bytes that must be moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from hal_ops._dtypes import torch_dtype
from hal_ops.attention import masks
from hal_ops.attention.request import AttentionRequest, Window
from hal_ops.case import Case

__all__ = ["CountedCase", "flop", "num_bytes"]

Lengths = Sequence[tuple[int, int]]


class CountedCase(Case):
    """A case of attention, whose work follows from its request, phase and lengths."""

    request: AttentionRequest
    phase: str
    lengths: tuple[tuple[int, int], ...]

    def flop(self) -> float:
        return flop(self.request, self.lengths)

    def num_bytes(self) -> float:
        return num_bytes(self.request, self.phase, self.lengths)

    def size(self) -> str:
        counts = Counter(self.lengths)
        return ", ".join(f"{n} x {q} queries over {kv} keys" for (q, kv), n in counts.items())


def flop(request: AttentionRequest, lengths: Lengths) -> float:
    """Operations of both products, over the pairs of a query and a key that the mask leaves; two a multiplication.

    Args:
        lengths: (q_len, kv_len) a sequence.
    """
    limits = masks.sides(request.causal, request.window)
    pairs = sum(_pairs(q, kv, limits)[0] for q, kv in lengths)
    return 2.0 * request.num_q_heads * (request.head_dim + request.v_head_dim) * pairs


def num_bytes(request: AttentionRequest, phase: str, lengths: Lengths) -> float:
    """Bytes of q and out, and of the keys and values that some query sees, each once.

    Args:
        phase: ``"prefill"`` reads q, k and v in ``qkv_dtype``; the others a cache in ``kv_dtype``.
        lengths: (q_len, kv_len) a sequence.
    """
    limits = masks.sides(request.causal, request.window)
    own = torch_dtype(request.dtype).itemsize
    fresh = torch_dtype(request.qkv_dtype).itemsize
    item = fresh if phase == "prefill" else torch_dtype(request.kv_dtype).itemsize
    queries = sum(q for q, _ in lengths)
    keys = sum(_pairs(q, kv, limits)[1] for q, kv in lengths)
    rows = queries * request.num_q_heads
    dims = float(request.head_dim + request.v_head_dim)
    total: float = rows * (fresh * request.head_dim + own * request.v_head_dim)
    total += dims * item * keys * request.num_kv_heads
    return total


def _pairs(q_len: int, kv_len: int, limits: Window) -> tuple[int, int]:
    """Pairs of a query and a key that it sees, and keys that some query sees."""
    if not (q_len and kv_len):
        return 0, 0
    positions = torch.arange(kv_len - q_len, kv_len)
    low = torch.zeros_like(positions) if limits[0] is None else (positions - limits[0]).clamp_min(0)
    high = torch.full_like(positions, kv_len) if limits[1] is None else (positions + limits[1] + 1).clamp(0, kv_len)
    seen = (high - low).clamp_min(0)
    return int(seen.sum()), max(0, int(high.max() - low.min()))
