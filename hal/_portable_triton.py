"""What the ``portable`` platform declares about Triton kernels over a paged cache: decode, cache write, merge. Data."""

from __future__ import annotations

from collections.abc import Sequence

from hal._constraints import Anything, Constraint, OneOf, Range, Windows
from hal._device import Device
from hal._kernel import Archs, Band, Kernel, Needs
from hal._reason import Reason
from hal_ops import FP8_DTYPES, Request, is_fp8

__all__ = ["kernels"]

_PLATFORMS = {
    "nvidia": Archs(at_least="sm_80"),
    "rocm": Archs(only=("gfx90a", "gfx942", "gfx950", "gfx11*", "gfx12*")),
    "musa": Archs(),
}
_NEEDS = (
    Needs("torch", ">=2.6", install="`pip install torch`"),
    Needs("triton", ">=3.2", ("triton", "pytorch-triton", "pytorch-triton-rocm")),
)
_COMPILED = ("sm_80", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100")
_EVIDENCE = {"sm_90": "run", **dict.fromkeys(_COMPILED, "compiled"), "*": "claimed"}
_FLOATS = ("float16", "bfloat16", "float32")
_FLAG = OneOf(False, True)

Fields = dict[str, Constraint]


def kernels() -> tuple[Kernel, ...]:
    """Decode, the cache write and the merge of attention states."""
    return (
        _kernel("attention", "decode", "hal_ops.attention.triton_decode:decode", _DECODE, ("kv_dtype", True)),
        _kernel("kv_cache_write", "call", "hal_ops.kv_cache.triton_write:write", _WRITE, ("kv_dtype", False)),
        _kernel("merge_attention_states", "call", "hal_ops.merge_states.triton_merge:merge", _MERGE, None),
    )


def _kernel(op: str, phase: str, target: str, fields: Fields, cache: tuple[str, bool] | None) -> Kernel:
    """``cache``: the field that names a format, and whether one that is not FP8 must be the request's own."""

    def check(request: Request, device: Device) -> Sequence[Reason]:
        assert cache is not None
        return _format_reasons(request, device, *cache)

    return Kernel(
        name=f"triton.{op if phase == 'call' else phase}",
        op=op,
        phase=phase,
        target=target,
        priority=Band.PORTABLE + 50,
        platforms=_PLATFORMS,
        needs=_NEEDS,
        capabilities=frozenset({"triton"}),
        fields={**fields, "deterministic": _FLAG, "graph": _FLAG},
        check=None if cache is None else check,
        evidence=_EVIDENCE,
    )


def _format_reasons(request: Request, device: Device, field: str, same: bool) -> list[Reason]:
    """FP8 formats are those that Triton converts on the device; the platforms say which."""
    given, own = getattr(request, field), request.dtype  # type: ignore[attr-defined]
    if not is_fp8(given):
        if given == own or not same:
            return []
        text = f"{field} {given} with dtype {own}: the cache is in the dtype of the queries, or in an FP8 format"
        return [Reason("dtype", text, field, given, own)]
    needed = f"triton_{given.replace('float8', 'fp8')}"
    if needed in device.capabilities:
        return []
    return [Reason("capability_missing", f"Triton does not convert {given} on {device.arch.name}", field, given)]


_DECODE: Fields = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Range(1, 256, (64, 80, 192)),
    "v_head_dim": Range(1, 256, (64, 80, 128)),
    "dtype": OneOf(*_FLOATS),
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48, 64, 256)),
    "kv_layout": OneOf("NHD", "HND"),
    "max_q_len": Range(1, 16, (4,)),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softcap": Range(0, None, (30.0,)),
    "sinks": _FLAG,
    "alibi": _FLAG,
    "softmax_scale": Anything((0.3,)),
    "kv_scale": OneOf("tensor", "head"),
    "return_lse": _FLAG,
}
_WRITE: Fields = {
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Range(1, None, (64, 80)),
    "v_head_dim": Range(1, None, (64, 48)),
    "dtype": OneOf(*_FLOATS),
    "kv_dtype": OneOf(*_FLOATS, *FP8_DTYPES),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HND"),
    "kv_scale": OneOf("tensor", "head"),
}
_MERGE: Fields = {
    "num_heads": Anything((1, 6)),
    "v_head_dim": Range(1, None, (64, 80)),
    "dtype": OneOf(*_FLOATS),
}
