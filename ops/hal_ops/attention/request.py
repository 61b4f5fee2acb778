"""``AttentionRequest``: everything that decides which attention kernel computes the right thing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from hal_ops._checks import flag, positive
from hal_ops._dtypes import cache_dtype, device_fp8, dtype_name, is_fp8
from hal_ops._record import record
from hal_ops._request import AUTO, Request, feature, required
from hal_ops.kv_layout import KV_LAYOUTS, check_vectors

__all__ = ["AttentionRequest", "PHASES", "Window", "normalize_window"]

PHASES = ("prefill", "extend", "decode")
PAGED = ("extend", "decode")
OPEN_LAYOUTS = ("NHD", "HND")
"""What ``"auto"`` stands for. Tensors of another layout have other shapes, so it has to be asked for by name."""

Window = tuple["int | None", "int | None"]


def normalize_window(window: Any, *, causal: bool = True) -> Window:
    """The canonical ``(left, right)`` of a sliding window: tokens beside the diagonal, inclusive, ``None`` unlimited.

    An int ``W`` means *W keys, the query's own included*, which only causal attention can count: ``(W - 1, 0)``.
    ``None``, ``-1``, ``(None, None)`` and ``(-1, -1)`` mean no window. Under a causal mask the right side says nothing
    new: a window limited on the left becomes ``(left, 0)``, one that is not becomes ``(None, None)``.

    Raises:
        ValueError: for 0, for other negative numbers, for nested or longer sequences, and for an int without causality.
    """
    left, right = _sides(window, causal)
    if causal:
        right = None if left is None else 0
    return (left, right)


def _sides(window: Any, causal: bool) -> Window:
    if window is None or (_is_int(window) and window == -1):
        return (None, None)
    if _is_int(window):
        if window < 1:
            raise ValueError(f"window={window}: an int window counts keys, itself included, so it is at least 1")
        if not causal:
            raise ValueError(
                f"window={window}: without causality an int does not say where its keys lie; give (left, right)"
            )
        return (int(window) - 1, 0)
    if isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2:
        return (_side(window[0], window), _side(window[1], window))
    raise ValueError(f"window={window!r}: give None, an int (keys, itself included) or a pair (left, right)")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _side(value: Any, window: Any) -> int | None:
    if value is None or (_is_int(value) and value == -1):
        return None
    if _is_int(value) and value >= 0:
        return int(value)
    raise ValueError(f"window={window!r}: each side is a number of tokens >= 0, or None for unlimited")


@record(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """What a caller needs from attention. Every field takes part in the choice of kernels.

    Fields:
        num_q_heads: heads of q, a multiple of num_kv_heads; num_kv_heads: heads of k and v.
        head_dim: elements a head of q and k; v_head_dim: those of v (default: ``head_dim``).
        dtype: format of q, k, v and of the output; ``kv_dtype``: format of the cache (default: ``dtype``;
            ``"fp8"`` becomes the e4m3 flavour of the device).
        causal: each query sees keys up to its own position, aligned to the end of the keys.
        window: ``(left, right)`` or an int, see :func:`normalize_window`.
        softcap: ``cap * tanh(score / cap)`` on scaled scores; 0 is off.
        sinks: one learned logit a query head, in the denominator only. alibi: one slope a query head.
        softmax_scale: multiplies q·k; default ``1 / sqrt(head_dim)``, written out here.
        page_size: tokens a page of the cache, or ``"auto"``; kv_layout: ``"NHD"``, ``"HND"``, ``"HDN"`` or ``"auto"``,
            which is never ``"HDN"``.
        kv_scale: an FP8 cache has one k and one v scale a ``"tensor"`` or a ``"head"``.
        qkv_dtype: format of q, k and v where they are fresh (prefill), if it is FP8 (default: ``dtype``, which the output
            has); qkv_scale: such a call has one q, k and v scale a ``"tensor"`` or a ``"head"`` of k and v.
        fp8_query: a permission: over an FP8 cache, kernels may round q and the probabilities to the cache's format
            (faster products, errors of some percent). A kernel that keeps their precision serves such a request too.
        max_q_len: most queries a sequence in the decode phase (more than 1 for speculative decoding).
        return_lse: calls may ask for the natural log of each softmax denominator; deterministic: equal inputs give equal
            bits; needs_grad: gradients reach q, k and v; graph: calls can be captured.
        phases: the phases that the caller will use. With ``needs_grad`` or an FP8 ``qkv_dtype`` the default is prefill
            alone.

    Raises:
        ValueError: a value that no kernel could honour (negative softcap, heads that do not divide, ...).
    """

    op: ClassVar[str] = "attention"
    derived: ClassVar[tuple[str, ...]] = ("group_size", "fp8_query")

    num_q_heads: int = required()
    num_kv_heads: int = required()
    head_dim: int = required(code="head_dim")
    v_head_dim: int = required(default=None, code="head_dim", plain=lambda r: r.head_dim)
    dtype: str = required(default="bfloat16", code="dtype")
    kv_dtype: str = required(default=AUTO, phases=PAGED, code="dtype", plain=lambda r: r.dtype)
    page_size: int | str = required(
        default=AUTO, phases=PAGED, code="page_size", preferred=(16, 32, 64, 128, 256, 8, 1)
    )
    kv_layout: str = required(default=AUTO, phases=PAGED, code="layout", preferred=OPEN_LAYOUTS, closed=True)
    max_q_len: int = required(default=1, phases=("decode",), plain=1)
    causal: bool = required(default=True, plain=True)
    window: Window = feature((None, None))
    softcap: float = feature(0.0)
    sinks: bool = feature(False)
    alibi: bool = feature(False)
    softmax_scale: float = feature(lambda r: 1.0 / math.sqrt(r.head_dim))
    kv_scale: str = feature("tensor", phases=PAGED)
    qkv_dtype: str = feature(lambda r: r.dtype, phases=("prefill",), code="dtype")
    qkv_scale: str = feature("tensor", phases=("prefill",))
    return_lse: bool = feature(False)
    deterministic: bool = feature(False)
    needs_grad: bool = feature(False)
    graph: bool = feature(False)
    phases: tuple[str, ...] | None = None
    fp8_query: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "max_q_len"):
            positive(name, getattr(self, name))
        put(self, "v_head_dim", self.head_dim if self.v_head_dim is None else self.v_head_dim)
        positive("v_head_dim", self.v_head_dim)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every kv head serves the same number of q heads"
            )
        put(self, "dtype", dtype_name(self.dtype))
        put(self, "kv_dtype", cache_dtype(self.kv_dtype, self.dtype))
        put(self, "qkv_dtype", cache_dtype(self.qkv_dtype, self.dtype))
        put(self, "softcap", _softcap(self.softcap))
        put(self, "softmax_scale", _scale(self.softmax_scale, self.head_dim))
        for name in ("causal", "sinks", "alibi", "return_lse", "deterministic", "needs_grad", "graph", "fp8_query"):
            flag(name, getattr(self, name))
        put(self, "window", normalize_window(self.window, causal=self.causal))
        self._check_cache()
        fresh_fp8 = self.qkv_dtype != self.dtype
        put(self, "phases", _phases(self.phases, alone=self.needs_grad or fresh_fp8))
        if fresh_fp8 or self.qkv_scale != "tensor":
            self._check_fresh()

    def _check_cache(self) -> None:
        if self.page_size != AUTO:
            positive("page_size", self.page_size)
        if self.kv_layout not in (*KV_LAYOUTS, AUTO):
            raise ValueError(f"kv_layout={self.kv_layout!r}: choose 'NHD', 'HND', 'HDN' or 'auto'")
        check_vectors(self.kv_layout, self.head_dim, "float8_e4m3fn" if self.kv_dtype == "fp8" else self.kv_dtype)
        if self.kv_scale not in ("tensor", "head"):
            raise ValueError(f"kv_scale={self.kv_scale!r}: choose 'tensor' (one scale) or 'head' (one a kv head)")
        if self.kv_scale == "head" and not (is_fp8(self.kv_dtype) or self.kv_dtype == "fp8"):
            raise ValueError(f"kv_scale='head' needs an FP8 cache; kv_dtype is {self.kv_dtype}")

    def _check_fresh(self) -> None:
        """FP8 q, k and v, which are of fresh calls alone."""
        if self.qkv_scale not in ("tensor", "head"):
            raise ValueError(f"qkv_scale={self.qkv_scale!r}: choose 'tensor' (one scale) or 'head' (one a kv head)")
        if not (is_fp8(self.qkv_dtype) or self.qkv_dtype == "fp8"):
            if self.qkv_dtype == self.dtype:
                raise ValueError(f"qkv_scale='head' needs FP8 q, k and v; qkv_dtype is {self.qkv_dtype}")
            raise ValueError(f"qkv_dtype={self.qkv_dtype}: q, k and v are in dtype, {self.dtype}, or in an FP8 format")
        if self.phases != ("prefill",):
            raise ValueError(
                f"qkv_dtype={self.qkv_dtype} with phases {', '.join(self.phases or ())}: FP8 q, k and v are of calls "
                "without a cache (phases='prefill'); over a cache kv_dtype and fp8_query say what may be FP8"
            )
        if self.needs_grad:
            raise ValueError(f"needs_grad=True with qkv_dtype={self.qkv_dtype}: FP8 values have no gradient")

    @property
    def group_size(self) -> int:
        """Query heads a kv head."""
        return self.num_q_heads // self.num_kv_heads

    def resolved(self, capabilities: frozenset[str]) -> AttentionRequest:
        """Replace the generic ``"fp8"`` of ``kv_dtype`` and ``qkv_dtype`` by the e4m3 flavour that the device declares.

        Raises:
            ValueError: the device declares neither ``fp8_e4m3fn`` nor ``fp8_e4m3fnuz``.
        """
        generic = [name for name in ("kv_dtype", "qkv_dtype") if getattr(self, name) == "fp8"]
        return self.replace(**dict.fromkeys(generic, device_fp8(capabilities))) if generic else self

    def extra_keywords(self, phase: str) -> tuple[str, ...]:
        return ("q_scale", "k_scale", "v_scale") if phase == "prefill" and is_fp8(self.qkv_dtype) else ()

    def describe(self) -> str:
        """One line for people: heads, dims, formats, and every feature that is on."""
        dims = f"head_dim {self.head_dim}"
        if self.v_head_dim != self.head_dim:
            dims += f", v_head_dim {self.v_head_dim}"
        parts = [f"{self.num_q_heads}/{self.num_kv_heads} heads", dims, self.dtype]
        if set(self.phases or ()) & set(PAGED):
            parts += [f"KV {self.kv_dtype}", f"page_size {self.page_size}", f"layout {self.kv_layout}"]
        parts.append("causal" if self.causal else "bidirectional")
        parts += [text for name, text in self._features() if not self.is_neutral(name)]
        if self.fp8_query:
            parts.append("fp8_query")
        if self.max_q_len != 1:
            parts.append(f"max_q_len {self.max_q_len}")
        if self.phases != PHASES:
            parts.append(f"{' and '.join(self.phases or ())} only")
        return ", ".join(parts)

    def _features(self) -> tuple[tuple[str, str], ...]:
        shown = {
            "window": f"window {self.window}",
            "softcap": f"softcap {self.softcap:g}",
            "softmax_scale": f"softmax_scale {self.softmax_scale:g}",
            "kv_scale": f"kv_scale per {self.kv_scale}",
            "qkv_dtype": f"q, k, v {self.qkv_dtype}",
            "qkv_scale": f"qkv_scale per {self.qkv_scale}",
        }
        return tuple((n, shown.get(n, n)) for n, rule in self.rules().items() if not rule.required)


def _softcap(value: Any) -> float:
    cap = 0.0 if value is None else float(value)
    if not (math.isfinite(cap) and cap >= 0):
        raise ValueError(f"softcap={value!r}: give a finite cap above 0, or 0 (or None) for none")
    return cap


def _scale(value: Any, head_dim: int) -> float:
    scale = 1.0 / math.sqrt(head_dim) if value is None else float(value)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale={value!r}: give a finite number, or None for 1/sqrt(head_dim)")
    return scale


def _phases(value: Any, *, alone: bool) -> tuple[str, ...]:
    if value is None:
        return ("prefill",) if alone else PHASES
    chosen = (value,) if isinstance(value, str) else tuple(value)
    wrong = [p for p in chosen if p not in PHASES]
    if wrong or not chosen:
        raise ValueError(f"phases={value!r}: choose some of {', '.join(PHASES)}")
    return tuple(p for p in PHASES if p in chosen)
