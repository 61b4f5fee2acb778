"""``MlaAttentionRequest``: multi-head latent attention (DeepSeek-V2, section 2.1), as a decision sees it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from hal_ops._checks import flag, positive
from hal_ops._dtypes import cache_dtype, device_fp8, dtype_name
from hal_ops._record import record
from hal_ops._request import AUTO, Request, feature, required
from hal_ops.attention import AttentionRequest

__all__ = ["MlaAttentionRequest", "PHASES"]

PHASES = ("extend", "decode")


@record(frozen=True, kw_only=True)
class MlaAttentionRequest(Request):
    """What a caller needs from latent attention. The defaults are the dims of DeepSeek-V2 and DeepSeek-V3.

    Fields:
        num_q_heads: query heads; they share one latent key a token.
        kv_lora_rank: elements of the latent, which is a key's first part and the whole value.
        qk_rope_head_dim: elements of the rotated part of q and k, shared by all heads.
        qk_nope_head_dim: elements a head of q and k before absorption, without the rotated part; v_head_dim: of v before
            absorption.
        dtype: format of q, of the latents and of the output. kv_dtype: format of the cache, latents and rotated keys
            alike (default: ``dtype``; ``"fp8"`` becomes the e4m3 flavour of the device). An FP8 cache has one scale.
        fp8_query: a permission: over an FP8 cache, kernels may round q and the probabilities to the cache's format
            (faster products, errors of some percent). A kernel that keeps their precision serves such a request too.
        page_size: tokens a page of the cache, or ``"auto"``.
        max_q_len: most queries a sequence in the decode phase (more than 1 for speculative decoding).
        softmax_scale: multiplies q·k; default ``1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)``, written out here.
        causal: each query sees keys up to its own position, aligned to the end of the keys.
        return_lse: calls may ask for the natural log of each softmax denominator; deterministic: equal inputs give equal
            bits; graph: calls can be captured.
        phases: the phases that the caller will use.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    op: ClassVar[str] = "mla_attention"
    derived: ClassVar[tuple[str, ...]] = ("fp8_query",)

    num_q_heads: int = required()
    kv_lora_rank: int = required(default=512, code="head_dim")
    qk_rope_head_dim: int = required(default=64, code="head_dim")
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    dtype: str = required(default="bfloat16", code="dtype")
    kv_dtype: str = required(default=AUTO, code="dtype", plain=lambda r: r.dtype)
    page_size: int | str = required(default=AUTO, code="page_size", preferred=(64, 16, 32, 128, 256, 8, 1))
    max_q_len: int = required(default=1, phases=("decode",), plain=1)
    causal: bool = required(default=True, plain=True)
    softmax_scale: float = feature(lambda r: 1.0 / math.sqrt(r.qk_nope_head_dim + r.qk_rope_head_dim))
    return_lse: bool = feature(False)
    deterministic: bool = feature(False)
    graph: bool = feature(False)
    phases: tuple[str, ...] | None = PHASES
    fp8_query: bool = False

    def __post_init__(self) -> None:
        put: Any = object.__setattr__
        dims = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        for name in ("num_q_heads", *dims, "max_q_len"):
            positive(name, getattr(self, name))
        if self.page_size != AUTO:
            positive("page_size", self.page_size)
        put(self, "dtype", dtype_name(self.dtype))
        put(self, "kv_dtype", cache_dtype(self.kv_dtype, self.dtype))
        for name in ("causal", "return_lse", "deterministic", "graph", "fp8_query"):
            flag(name, getattr(self, name))
        put(self, "softmax_scale", _scale(self))
        put(self, "phases", _phases(self.phases))

    @property
    def entry_dim(self) -> int:
        """Elements of one cache entry, and of a head of the absorbed q: the latent, then the rotated part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def resolved(self, capabilities: frozenset[str]) -> MlaAttentionRequest:
        """Replace the generic ``kv_dtype="fp8"`` by the e4m3 flavour that the device declares.

        Raises:
            ValueError: the device declares neither ``fp8_e4m3fn`` nor ``fp8_e4m3fnuz``.
        """
        return self.replace(kv_dtype=device_fp8(capabilities)) if self.kv_dtype == "fp8" else self

    def absorbed(self) -> AttentionRequest:
        """The same attention as multi-query attention over cache entries, whose first ``kv_lora_rank`` are the value.

        This is exact once the projections from latents to keys and values are applied to q and to the output instead.
        """
        return AttentionRequest(
            num_q_heads=self.num_q_heads,
            num_kv_heads=1,
            head_dim=self.entry_dim,
            v_head_dim=self.kv_lora_rank,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            kv_layout="NHD",
            max_q_len=self.max_q_len,
            graph=self.graph,
            phases=self.phases,
            fp8_query=self.fp8_query,
            **self._shared(),
        )

    def expanded(self) -> AttentionRequest:
        """Attention of fresh tokens whose latents were projected to a key and a value a head."""
        return AttentionRequest(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_q_heads,
            head_dim=self.qk_nope_head_dim + self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            phases=("prefill",),
            **self._shared(),
        )

    def _shared(self) -> dict[str, Any]:
        names = ("dtype", "causal", "softmax_scale", "return_lse", "deterministic")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """One line for people: heads, dims, formats, and every feature that is on."""
        parts = [
            f"{self.num_q_heads} heads",
            f"latent {self.kv_lora_rank}+{self.qk_rope_head_dim}",
            self.dtype,
            f"KV {self.kv_dtype}",
            f"page_size {self.page_size}",
            "causal" if self.causal else "bidirectional",
        ]
        if not self.is_neutral("softmax_scale"):
            parts.append(f"softmax_scale {self.softmax_scale:g}")
        parts += [name for name in ("return_lse", "deterministic", "graph", "fp8_query") if getattr(self, name)]
        if self.max_q_len != 1:
            parts.append(f"max_q_len {self.max_q_len}")
        if self.phases != PHASES:
            parts.append(f"{' and '.join(self.phases or ())} only")
        return ", ".join(parts)


def _scale(request: MlaAttentionRequest) -> float:
    value = request.softmax_scale
    if value is None:
        return 1.0 / math.sqrt(request.qk_nope_head_dim + request.qk_rope_head_dim)
    if not math.isfinite(value):
        raise ValueError(
            f"softmax_scale={value!r}: give a finite number, or None for 1/sqrt(qk_nope_head_dim + qk_rope_head_dim)"
        )
    return float(value)


def _phases(value: Any) -> tuple[str, ...]:
    if value is None:
        return PHASES
    chosen = (value,) if isinstance(value, str) else tuple(value)
    wrong = [p for p in chosen if p not in PHASES]
    if wrong or not chosen:
        raise ValueError(f"phases={value!r}: choose some of {', '.join(PHASES)}")
    return tuple(p for p in PHASES if p in chosen)
