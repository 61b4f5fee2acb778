"""What a caller writes around flashinfer's functions where those alone are not the op, for tensors that suit them.

``apply_rope_with_cos_sin_cache`` reads beside its table, which is one of cosines and sines in float32; a position outside
must not do that. ``append_paged_kv_cache`` can skip no token. ``merge_state`` takes logs in base 2, and gives NaN where both
states are without keys, or where one without keys holds NaN. Nothing is checked here, as in a program of one's own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.merge_states import MergeStatesRequest
from hal_ops.rotary_embedding import RotaryEmbeddingRequest

__all__ = ["BY_HAND"]


def rotary_embedding(request: RotaryEmbeddingRequest) -> Callable[..., Any]:
    """Each token gets its own row of a table that is made for the call, and a row behind it for what is read beside."""
    rope = importlib.import_module("flashinfer.rope").apply_rope_with_cos_sin_cache
    dim, half, neox = request.head_dim, request.rotary_dim // 2, request.style == "neox"

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Any:
        count = positions.shape[0]
        table = torch.empty(count + 1, 2 * half, dtype=torch.float32, device=q.device)
        left, right = table[:count].chunk(2, 1)
        torch.index_select(cos, 0, positions, out=left)
        torch.index_select(sin, 0, positions, out=right)
        return rope(torch.arange(count, dtype=torch.int32, device=q.device), q, k, dim, table, neox)

    return call


def kv_cache_write(request: KvCacheWriteRequest) -> Callable[..., Any]:
    """A skipped token repeats one that is not; where all are skipped, slot 0 is given what it holds."""
    append = importlib.import_module("flashinfer.page").append_paged_kv_cache
    layout = request.kv_layout

    def call(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        count, place = slots.shape[0], k.device
        largest, last = slots.max(0)
        source = torch.where(slots < 0, last, torch.arange(count, device=place))
        some = largest >= 0
        keys = torch.where(some, k.index_select(0, source), k_cache[0, 0])
        values = torch.where(some, v.index_select(0, source), v_cache[0, 0])
        positions = slots.index_select(0, source).clamp_min_(0).int()
        zeros = torch.zeros(max(count, 2), dtype=torch.int32, device=place)
        pages = torch.arange(k_cache.shape[0], dtype=torch.int32, device=place)
        append(keys, values, zeros[:count], positions, (k_cache, v_cache), pages, zeros[:2], zeros[:1], layout)

    return call


def merge_attention_states(request: MergeStatesRequest) -> Callable[..., Any]:
    """Logs of both in base 2 and back, and zeros where there are no keys."""
    merge = importlib.import_module("flashinfer.cascade").merge_state
    log2_e, no_keys = math.log2(math.e), -1e30

    def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        logs = torch.stack((lse_a, lse_b))
        none = (logs == -torch.inf).unsqueeze(-1)
        logs.mul_(log2_e).clamp_min_(no_keys)
        cleared_a, cleared_b = torch.where(none[0], 0.0, out_a), torch.where(none[1], 0.0, out_b)
        merged, total = merge(cleared_a, logs[0], cleared_b, logs[1])
        return merged, torch.threshold_(total.mul_(1 / log2_e), no_keys / 2, -torch.inf)

    return call


BY_HAND: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "flashinfer.rotary_embedding": rotary_embedding,
    "flashinfer.kv_cache_write": kv_cache_write,
    "flashinfer.merge_attention_states": merge_attention_states,
}
"""Kernel to what makes its direct call."""
