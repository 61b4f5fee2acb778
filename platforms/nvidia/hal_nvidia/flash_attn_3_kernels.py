"""What is declared about flash-attention 3: upstream's builds (``flash-attn-3``) and the wheel ``tokenspeed-fa3``.

Read from upstream's ``hopper/`` at 203b9b3d (2025-08-29), 701ebe05 and 0251105a (2026-08-15), and from tokenspeed-fa3
3.0.0.post20260810:

* archs: ``flash_api.cpp`` asks for 8.0 or newer and dispatches 10.x and 12.x to code for 9.0a, which cannot run there:
  8.0 (unless left out of the build) and 9.0 alone. CUDA 12.3 is the least that it is built with; what the wheel was
  built with is in ``_flash_attn_3_build.py``.
* float16 and bfloat16; e4m3 for q, k and v together alone, output bfloat16. Over an e4m3 cache that needs
  ``fp8_query``: the adapter makes such queries, with one scale a call.
* head dims up to 256, multiples of 8 (of 16 in FP8); on 9.0 also 192 with 128, and up to 64 with up to 512. The code of
  unequal dims is inside that of the equal ones (``run_mha_fwd_constexpr``: ``HDIMDIFF64`` in ``HDIM64``, ``HDIMDIFF192`` in
  ``HDIM192``). Without ``HDIM64`` a v of 256 or 512 goes to the code of 96, which writes no more of it; without ``HDIM192``
  192 with 128 goes to the code of 256, where it was never tried.
* the backward pass has one head dim for all three tensors, the larger one rounded up to what was built (``mha_bwd``:
  ``round_up_headdim(std::max(head_size, head_size_v))``): at most 256, and no code of 256 that is deterministic.
* a paged cache goes through ``flash_attn_with_kvcache`` alone, with any page size; strides are free.
* pages that its TMA path reads whole (``get_pagedkv_tma``: a multiple of the key tile, and more queries than one tile
  holds) let NaN in unused slots through (flash-attention#1745): those page sizes are not declared.
* sinks only in tokenspeed-fa3, as bfloat16. No ALiBi.
* A distribution called ``flash_attn_3`` with a module ``flash_attn_interface`` is also MATE's wrapper for MUSA
  (github.com/MooreThreads/mate at 9ac89cf, ``wrappers/flash-attention``): Python alone. The extension
  ``flash_attn_3._C`` (``hopper/setup.py``, ``ext_modules``; in the wheel of tokenspeed-fa3 too) proves the right one.

Band: on 9.0 the fastest for long prompts (H100: 740 TFLOP/s forward in 16 bits, says the FlashAttention-3 paper):
specialized. Measured here on an H200 (``benchmarks/results``): prefill and extend a tenth to a fifth faster than
the portable kernels, decode slower than them. On 8.0 nothing is known that it does better than flash-attention 2:
below that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
    Either,
    Kernel,
    MultipleOf,
    Needs,
    OneOf,
    Pairs,
    Range,
    Reason,
    SameAs,
    Windows,
)
from hal_nvidia._flash_attn_3_build import DISTRIBUTIONS, INSTALL, Build, build, candidate, unmet
from hal_ops.attention import AttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_FP8 = "float8_e4m3fn"
_SMALLEST_TILE = 64
"""Fewest queries, times heads a kv head, of any tile (``hopper/tile_size.h``, the first number)."""
_SAFE_PAGE = 64
_NOT_BOTH = ((False, False), (False, True), (True, False))

_COMMON: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": MultipleOf(8, high=256),
    "v_head_dim": Either(SameAs("head_dim"), Pairs("head_dim", (192, 128), (64, 256), (64, 512))),
    "dtype": OneOf("bfloat16", "float16"),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softcap": Range(0, None, (30.0,)),
    "sinks": Pairs("return_lse", *_NOT_BOTH),
    "softmax_scale": Anything((0.3,)),
    "return_lse": OneOf(False, True),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}
_FRESH: Mapping[str, Constraint] = {
    "qkv_dtype": Either(SameAs("dtype"), OneOf(_FP8)),
    "qkv_scale": OneOf("tensor", "head"),
    "needs_grad": Pairs("sinks", *_NOT_BOTH),
    "return_lse": Pairs("needs_grad", *_NOT_BOTH),
}
_PAGED: Mapping[str, Constraint] = {
    "kv_dtype": Either(SameAs("dtype"), Pairs("fp8_query", (True, _FP8))),
    "fp8_query": OneOf(False, True),
    "kv_scale": OneOf("tensor", "head"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HND"),
    "max_q_len": Range(1, None, (4,)),
}


def _prefill(request: Request, device: Device) -> Sequence[Reason]:
    return tuple(_reasons(request, device, "prefill"))


def _extend(request: Request, device: Device) -> Sequence[Reason]:
    return tuple(_reasons(request, device, "extend"))


def _decode(request: Request, device: Device) -> Sequence[Reason]:
    return tuple(_reasons(request, device, "decode"))


def _reasons(request: Request, device: Device, phase: str) -> Iterator[Reason]:
    found = build() or candidate(device)
    if found is None or not isinstance(request, AttentionRequest):
        return
    yield from unmet(found, device)
    yield from _build_lacks(
        request, found, "flash_attn_varlen_func" if phase == "prefill" else "flash_attn_with_kvcache"
    )
    yield from _dims(request, device, found)
    if phase == "prefill":
        yield from _gradients(request, found)
        if request.qkv_dtype == _FP8:
            yield from _fp8(request, device, found, "qkv_dtype")
    else:
        yield from _cache(request, device, found, phase)


def _build_lacks(request: AttentionRequest, found: Build, function: str) -> Iterator[Reason]:
    if not found.optional_lse:
        text = f"{found.name} is a build of before 2025-08-29: its functions have no return_attn_probs"
        yield Reason("version_too_old", text, "library", remedy="build a newer one")
    if request.sinks and not found.sinks:
        yield _lacks("sinks", f"{function} of {found.name} takes no sinks")
    if request.sinks and request.dtype != "bfloat16":
        yield Reason("dtype", f"sinks with dtype {request.dtype}; needs bfloat16", "dtype", request.dtype, "bfloat16")
    for field, flag in (("softcap", "SOFTCAP"), ("window", "LOCAL")):
        if not request.is_neutral(field) and flag in found.without:
            yield _lacks(field, f"{found.name} was built without {field}")
    if request.dtype == "float16" and "FP16" in found.without:
        yield Reason("dtype", f"{found.name} was built without float16", "dtype", "float16", "bfloat16")


def _lacks(field: str, text: str) -> Reason:
    return Reason("feature_unsupported", f"{field}: {text}", field)


def _dims(request: AttentionRequest, device: Device, found: Build) -> Iterator[Reason]:
    dim, v_dim = request.head_dim, request.v_head_dim
    if dim > found.largest_head_dim:
        most = f"at most {found.largest_head_dim}"
        yield Reason("head_dim", f"head_dim {dim}; {found.name} was built for {most}", "head_dim", str(dim), most)
    if dim == v_dim:
        return
    if device.arch.name != "sm_90":
        text = f"v_head_dim {v_dim} with head_dim {dim} needs sm_90; this is {device.arch.name}"
        yield Reason("head_dim", text, "v_head_dim", str(v_dim), str(dim))
    size = 64 if dim <= 64 else 192
    for flag, words in (
        (f"HDIMDIFF{size}", "unequal head dims"),
        (f"HDIM{size}", f"head dim {size}, whose code has them"),
    ):
        if flag in found.without:
            text = f"v_head_dim {v_dim} with head_dim {dim}: {found.name} was built without {words}"
            yield Reason("head_dim", text, "v_head_dim", str(v_dim), str(dim))


def _gradients(request: AttentionRequest, found: Build) -> Iterator[Reason]:
    if "VARLEN" in found.without:
        yield Reason("check", f"{found.name} was built without ragged batches", "library")
    if not request.needs_grad:
        return
    if "BACKWARD" in found.without:
        yield _lacks("needs_grad", f"{found.name} was built without the backward pass")
    dim, v_dim, most = request.head_dim, request.v_head_dim, found.largest_head_dim
    if dim <= most < v_dim:
        text = f"v_head_dim {v_dim} with needs_grad; the backward pass of {found.name} has at most {most}"
        yield Reason("head_dim", text, "v_head_dim", str(v_dim), f"at most {most}")
    if request.deterministic and found.rounded(max(dim, v_dim)) > 192:
        yield _lacks("deterministic", f"the backward pass with head dims up to {max(dim, v_dim)} cannot be")


def _cache(request: AttentionRequest, device: Device, found: Build, phase: str) -> Iterator[Reason]:
    if "PAGEDKV" in found.without or "VARLEN" in found.without:
        yield Reason("check", f"{found.name} was built without paged or ragged attention", "library")
    if request.kv_dtype == _FP8:
        yield from _fp8(request, device, found, "kv_dtype")
    queries = request.max_q_len * request.group_size if phase == "decode" else None
    size = request.page_size
    if isinstance(size, int) and device.arch.name == "sm_90" and (queries is None or queries > _SMALLEST_TILE):
        narrow = request.v_head_dim > 256 or (request.head_dim > 192 and not request.is_neutral("window"))
        most = _SAFE_PAGE - 1 if narrow else _SAFE_PAGE
        if size > most:
            text = f"page_size {size}; needs at most {most}, where NaN in unused slots changes nothing"
            yield Reason("page_size", text, "page_size", str(size), f"at most {most}")


def _fp8(request: AttentionRequest, device: Device, found: Build, field: str) -> Iterator[Reason]:
    dim, v_dim, is_fp8 = request.head_dim, request.v_head_dim, f"{field} {_FP8}"
    if device.arch.name != "sm_90":
        yield Reason("dtype", f"{is_fp8} needs sm_90; this is {device.arch.name}", field, _FP8, request.dtype)
    if "FP8" in found.without:
        yield Reason("dtype", f"{found.name} was built without FP8", field, _FP8, request.dtype)
    if request.dtype != "bfloat16":
        text = f"dtype {request.dtype} with {is_fp8}; needs bfloat16, which the output has"
        yield Reason("dtype", text, "dtype", request.dtype, "bfloat16")
    if dim % 16:
        yield Reason("head_dim", f"head_dim {dim} with {is_fp8}; needs a multiple of 16", "head_dim", str(dim), "16")
    if dim != v_dim:
        text = f"v_head_dim {v_dim} with head_dim {dim} and {is_fp8}, where it was never tried"
        yield Reason("head_dim", text, "v_head_dim", str(v_dim), str(dim))
    if request.sinks:
        yield _lacks("sinks", f"not with {is_fp8}, where it was never tried")


def _built_archs() -> frozenset[str] | None:
    found = build()
    return None if found is None else found.archs


def _kernel(phase: str, check: object, more: Mapping[str, Constraint], copies: Mapping[str, str]) -> Kernel:
    return Kernel(
        name=f"fa3.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_nvidia._flash_attn_3:{phase}",
        priority=Band.SPECIALIZED + 30,
        priorities={"sm_80": Band.PERFORMANT + 20},
        platforms={"nvidia": Archs(only=("sm_80", "sm_90"))},
        needs=(
            Needs("torch", ">=2.6"),
            Needs(
                "flash-attn-3",
                distributions=DISTRIBUTIONS,
                install=INSTALL,
                module="flash_attn_3._C",
            ),
        ),
        runtime=">=12.3",
        fields={**_COMMON, **more},
        check=check,  # type: ignore[arg-type]
        built_archs=_built_archs,
        copies_with=copies,
        row_alignment=16,
        # On an H200 with tokenspeed-fa3, which is built without these three.
        evidence={"sm_90": "run", "*": "emulated"},
        evidence_with=dict.fromkeys(("softcap", "v_head_dim", "needs_grad"), "emulated"),
        note="flash-attention 3",
    )


_SINKS = {"sinks": "sinks, into bfloat16"}
_QUERIES = {**_SINKS, "kv_dtype": "q, into FP8; in captured graphs before that with zeros past the step"}
KERNELS = (
    _kernel("prefill", _prefill, _FRESH, {**_SINKS, "graph": "v, with zeros behind the last sequence"}),
    _kernel("extend", _extend, _PAGED, _QUERIES),
    _kernel("decode", _decode, _PAGED, _QUERIES),
)
