"""What is declared about aiter's attention kernels in CK and assembly (distribution ``amd-aiter``, module ``aiter``).

Read from the wheel 0.1.7.post2.dev18 and from github.com/ROCm/aiter at v0.1.7.post5 to v0.1.20.post1:

* archs: gfx942 and gfx950 are the ones that README.md calls supported; CK and assembly are for CDNA only.
* ``flash_attn_func`` and ``flash_attn_varlen_func`` (``aiter/ops/mha.py``): 16-bit, head dims to 256 in eights,
  windows as ``(left, right, sink tokens)``, LSE in natural log. For bf16 with head dims 128, or 192 with 128, an
  assembly kernel takes over where nothing it lacks is asked for; what it is not asked about and drops is in
  ``errata.json``. A window of no keys to the left passes for none there (``swa`` is ``left > 0``), and then finds no
  kernel. With a block table it takes over too, and ignores the table: pages go through the functions below.
  Its backward is not declared: the causal mask of the assembly one is top-left (``pssk`` in ``mha.py``).
* ``mha_batch_prefill_func``: its tiles read past a sequence's end, and multiply the values that they find there by 0
  (CK, ``block_fmha_batch_prefill_pipeline_qr_ks_vs_async.hpp``), so what lies behind the last token of a page would
  have to be finite. The contract lets it be NaN: a cache of any page size is given to it as pages of one token, see
  :mod:`hal_rocm._slots`. It checks strides as NHD has them. Head dims to 128; the versions before v0.1.13 find pages by
  32-bit offsets, which a cache above 2 GiB overflows (aiter#2893).
* ``paged_attention_ragged`` likewise (``csrc/cpp_itfs/pa/pa_kernels.cuh``: the last page stands for what is past the
  end). It caps logits with ALiBi in them, where the contract adds ALiBi to capped ones. Head dims are in steps of 64,
  up to 16 query heads share a kv head, and one query a row is all (``pa_ragged.cuh``). No windows, sinks or LSE.
* Sinks begin CK's running maximum, in the units of scores; its pipelines disagree on what these are with a soft cap or
  ALiBi (``set_tile(m, sink_v ...)``), so neither is declared with sinks.
* ``paged_attention_rocm`` wants K as ``[pages, heads, dim / x, page, x]``, an order that no view of an NHD or HND cache
  has: it serves the layout ``"HDN"`` alone, see :mod:`hal_rocm.aiter_pa_kernels`.
* FP8: CK wants FP8 queries too, and the paged kernel rounds them unscaled; neither is what a 16-bit request asks for.
* A soft cap is a tanh unless ``CK_TILE_ATTENTION_LOGITS_SOFT_CAP_DEFAULT`` makes aiter compile another formula, and is
  left out with ALiBi (``fmha_batch_prefill.py``); ``ENABLE_CK=0`` leaves these functions without CK.

Bands: AMD's assembly prefill is the fastest there is on CDNA3 (README.md: up to 14 times what it replaced):
specialized. The paged kernels were not measured against Triton's; a table of one entry a token costs, so they come
behind it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
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

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["AITER_ARCHS", "KERNELS", "environment", "needs_aiter"]

AITER_ARCHS = ("gfx942", "gfx950")
_CAP = "CK_TILE_ATTENTION_LOGITS_SOFT_CAP_DEFAULT"


def needs_aiter(versions: str = ">=0.1.7.post2.dev18") -> Needs:
    """AMD's aiter in some versions. The project that registries call ``aiter`` is another one."""
    install = "build github.com/ROCm/aiter for your ROCm; `pip install aiter` brings another project"
    return Needs("amd-aiter", versions, install=install, module="aiter.ops.mha")


def environment(request: Request, device: Device) -> Iterator[Reason]:
    """What variables of aiter's own change."""
    if os.environ.get("ENABLE_CK", "1") == "0":
        yield Reason("disabled_by_env", "ENABLE_CK=0 leaves aiter without its CK kernels", "library", remedy="unset it")
    formula = os.environ.get(_CAP, "0")
    if getattr(request, "softcap", 0.0) and formula != "0":
        text = f"softcap: {_CAP}={formula} makes aiter compile another formula than tanh"
        yield Reason("feature_unsupported", text, "softcap", remedy="unset it, and remove the modules aiter compiled")


def _together(request: Request) -> Iterator[Reason]:
    """Features that it applies wrongly together."""
    asked = [name for name in ("sinks", "softcap", "alibi") if getattr(request, name, False)]
    if len(asked) > 1:
        text = f"{' with '.join(asked)}: aiter applies one of them wrongly"
        yield Reason("feature_unsupported", text, asked[0])


def _paged(request: Request, device: Device) -> Sequence[Reason]:
    return (*environment(request, device), *_together(request))


def _prefill(request: Request, device: Device) -> Sequence[Reason]:
    reasons = list(_paged(request, device))
    left = getattr(request, "window", (None, None))[0]
    if left == 0:
        text = "window of no keys to the left: aiter takes it for no window, and finds no kernel"
        reasons.append(Reason("feature_unsupported", text, "window", str(left), "1 key or more to the left"))
    return reasons


_COMMON: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "dtype": OneOf("bfloat16", "float16"),
    "causal": OneOf(True, False),
    "softcap": Range(0, None, (30.0,)),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "alibi": OneOf(False, True),
    "deterministic": OneOf(False, True),
}
_CACHE: Mapping[str, Constraint] = {
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD"),
}
_PREFILL: Mapping[str, Constraint] = {
    "head_dim": Either(MultipleOf(8, 8, 256), OneOf(64, 192)),
    "v_head_dim": Either(SameAs("head_dim"), Pairs("head_dim", (192, 128))),
    "window": Windows(),
    "sinks": OneOf(False, True),
    "return_lse": OneOf(False, True),
}
_EXTEND: Mapping[str, Constraint] = {
    **_CACHE,
    "head_dim": MultipleOf(8, 8, 128),
    "v_head_dim": SameAs("head_dim"),
    "window": Windows(),
    "sinks": OneOf(False, True),
    "return_lse": OneOf(False, True),
}
_DECODE: Mapping[str, Constraint] = {
    **_CACHE,
    "head_dim": OneOf(64, 128),
    "v_head_dim": SameAs("head_dim"),
    "max_q_len": OneOf(1),
    "group_size": Range(1, 16),
    "graph": OneOf(False, True),
}


def _kernel(
    phase: str,
    priority: int,
    own: Mapping[str, Constraint],
    note: str,
    copies: str = "",
    copies_with: Mapping[str, str] = MappingProxyType({}),
    needs: Needs | None = None,
) -> Kernel:
    return Kernel(
        name=f"aiter.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_rocm._aiter:{phase}",
        priority=priority,
        platforms={"rocm": Archs(only=AITER_ARCHS)},
        needs=(Needs("torch", ">=2.6", install="install a ROCm build of torch"), needs or needs_aiter()),
        fields={**_COMMON, **own},
        check=_prefill if phase == "prefill" else _paged,
        copies=copies,
        copies_with=copies_with,
        evidence={"*": "emulated"},
        note=note,
    )


_MORE_QUERIES = "the output of dense batches with queries that see no key (they are put before it)"
_ALIKE = {"softcap": "dense q, k, v that are not contiguous"}
_HEADS = "q, where its heads are not contiguous"

KERNELS = (
    _kernel("prefill", Band.SPECIALIZED + 20, _PREFILL, "CK and assembly", _MORE_QUERIES, _ALIKE),
    _kernel("extend", Band.PERFORMANT + 30, _EXTEND, "mha_batch_prefill_func", needs=needs_aiter(">=0.1.13")),
    _kernel("decode", Band.PERFORMANT + 30, _DECODE, "paged_attention_ragged", _HEADS),
)
