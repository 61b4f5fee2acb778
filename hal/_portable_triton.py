"""What the ``portable`` platform declares about Triton kernels of attention and of its cache: data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hal._constraints import Anything, Constraint, Either, MultipleOf, OneOf, Range, SameAs, Windows
from hal._device import Device
from hal._kernel import Band, Kernel
from hal._portable_common import TORCH, TRITON, cache_format, fp8_format
from hal._reason import Reason
from hal_ops import FP8_DTYPES, Request, is_fp8
from hal_ops.attention import AttentionRequest
from hal_ops.kv_layout import KV_LAYOUTS

__all__ = ["KERNELS"]

_COMPILED = ("sm_80", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_EVIDENCE = {"sm_90": "run", **dict.fromkeys(_COMPILED, "compiled"), "*": "claimed"}
_FLOATS = ("float16", "bfloat16", "float32")
_FLAG = OneOf(False, True)

Fields = dict[str, Constraint]


def _kernel(
    op: str,
    phase: str,
    target: str,
    fields: Fields,
    priorities: Mapping[str, int] | None = None,
    check: Callable[[Request, Device], Sequence[Reason]] | None = None,
) -> Kernel:
    return Kernel(
        name=f"triton.{op if phase == 'call' else phase}",
        op=op,
        phase=phase,
        target=target,
        priority=Band.PORTABLE + 50,
        priorities=priorities or {},
        needs=(TORCH, TRITON),
        capabilities=frozenset({"triton"}),
        fields={**fields, "deterministic": _FLAG, "graph": _FLAG},
        check=check,
        evidence=_EVIDENCE,
    )


def _cache_of_q(request: Request, device: Device) -> Sequence[Reason]:
    """Attention reads a cache of q's format, or an FP8 one that Triton converts on the device."""
    assert isinstance(request, AttentionRequest)
    given, own = request.kv_dtype, request.dtype
    if is_fp8(given) or given == own:
        return cache_format(request, device)
    text = f"kv_dtype {given} with dtype {own}: the cache is in the dtype of the queries, or in an FP8 format"
    return [Reason("dtype", text, "kv_dtype", given, own)]


def _prefill(request: Request, device: Device) -> Sequence[Reason]:
    from hal_ops.attention.triton_limits import fp8_heads

    assert isinstance(request, AttentionRequest)
    wrong = fp8_heads(request, cached=False)
    return [*fp8_format(request.qkv_dtype, "qkv_dtype", device), *_heads(request, wrong)]


def _extend(request: Request, device: Device) -> Sequence[Reason]:
    from hal_ops.attention.triton_limits import fp8_heads

    assert isinstance(request, AttentionRequest)
    return [*_cache_of_q(request, device), *_heads(request, fp8_heads(request, cached=True))]


def _decode(request: Request, device: Device) -> Sequence[Reason]:
    from hal_ops.attention.triton_limits import fp8_heads_on

    assert isinstance(request, AttentionRequest)
    return [*_cache_of_q(request, device), *_heads(request, fp8_heads_on(device.arch.name, request))]


def _heads(request: AttentionRequest, text: str) -> Sequence[Reason]:
    return [Reason("head_dim", text, "head_dim", str(request.head_dim), "64")] if text else []


_ATTENTION: Fields = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": MultipleOf(16, high=256, samples=(64, 80, 192)),
    "v_head_dim": MultipleOf(16, high=256, samples=(64, 80, 128)),
    "dtype": OneOf(*_FLOATS),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softcap": Range(0, None, (30.0,)),
    "sinks": _FLAG,
    "alibi": _FLAG,
    "softmax_scale": Anything((0.3,)),
    "return_lse": _FLAG,
}
_PREFILL: Fields = {
    **_ATTENTION,
    "qkv_dtype": Either(SameAs("dtype"), OneOf(*FP8_DTYPES)),
    "qkv_scale": OneOf("tensor", "head"),
}
_EXTEND: Fields = {
    **_ATTENTION,
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48, 64, 256)),
    "kv_layout": OneOf(*KV_LAYOUTS),
    "kv_scale": OneOf("tensor", "head"),
}
_DECODE: Fields = {
    **_EXTEND,
    "head_dim": Range(1, 256, (64, 80, 192)),
    "v_head_dim": Range(1, 256, (64, 80, 128)),
    "max_q_len": Range(1, 16, (4,)),
}
_PREFILL_ON = {"sm_90": Band.PERFORMANT + 65}
_EXTEND_ON = {"sm_90": Band.SPECIALIZED + 15}
_DECODE_ON = {"sm_90": Band.SPECIALIZED + 45}
"""Where the kernels were measured beside the vendors' libraries: ``benchmarks/results``, on an H200."""
_WRITE: Fields = {
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Range(1, None, (64, 80)),
    "v_head_dim": Range(1, None, (64, 48)),
    "dtype": OneOf(*_FLOATS),
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf(*KV_LAYOUTS),
    "kv_scale": OneOf("tensor", "head"),
}
_MERGE: Fields = {
    "num_heads": Anything((1, 6)),
    "v_head_dim": Range(1, None, (64, 80)),
    "dtype": OneOf(*_FLOATS),
}

KERNELS = (
    _kernel("attention", "prefill", "hal_ops.attention.triton_prefill:prefill", _PREFILL, _PREFILL_ON, _prefill),
    _kernel("attention", "extend", "hal_ops.attention.triton_extend:extend", _EXTEND, _EXTEND_ON, _extend),
    _kernel("attention", "decode", "hal_ops.attention.triton_decode:decode", _DECODE, _DECODE_ON, _decode),
    _kernel("kv_cache_write", "call", "hal_ops.kv_cache.triton_write:write", _WRITE, check=cache_format),
    _kernel("merge_attention_states", "call", "hal_ops.merge_states.triton_merge:merge", _MERGE),
)
"""Attention in three phases, the cache write and the merge of attention states."""
