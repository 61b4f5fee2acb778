"""Requests that are made and served in no time."""

from __future__ import annotations

from typing import Any

__all__ = ["LATENT", "SMALL"]

SMALL: dict[str, Any] = {
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dtype": "float32",
    "device": "cpu",
    "page_size": 4,
}
LATENT: dict[str, Any] = {
    "num_q_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "dtype": "float32",
    "device": "cpu",
    "page_size": 4,
}
