"""What is declared about flash-attn on ROCm: ``fa2_ck`` is its CK back end, ``fa2_triton`` its Triton one.

One distribution and one set of Python functions (``flash_attn/flash_attn_interface.py``); which back end is behind them
is decided when it is imported: CK (the extension ``flash_attn_2_cuda``), or Triton with
``FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE``, newer ones also where the extension is missing. Read from flash-attn 2.8.3:

* CK (``csrc/flash_attn_ck``): gfx90a, gfx942 and gfx950 (``setup.py``); head dims to 256, in eights (others copy);
  pages in multiples of 128, whose tails are out of bounds to it (``page_block_navigator.hpp``); windows and ALiBi; LSE
  in natural log, +inf where there are no keys at all. ``softcap`` is an argument that it ignores (its name is commented
  out), so a soft cap is refused. No sinks, no FP8. Gradients through the output, not through the LSE.
* Triton (``flash_attn/flash_attn_triton_amd``): windows, caps and block tables are arguments that it ignores. The LSE
  of a row that sees no key is written as 0, and over its neighbours' in a ragged batch (``fwd_prefill.py``: the early
  exit masks by ``MAX_SEQLENS_Q``), so neither LSEs nor gradients, which need them, are declared.

Bands: CK behind aiter, which carries the newer CK; Triton behind CK.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
    Kernel,
    MultipleOf,
    Needs,
    OneOf,
    Range,
    Reason,
    SameAs,
    Windows,
)

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS", "SWITCH"]

SWITCH = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
"""The variable by which flash-attn chooses its Triton back end."""

_NEEDS = (
    Needs("torch", ">=2.6", install="install a ROCm build of torch"),
    Needs("flash-attn", ">=2.8", install="`pip install 'torch-hal-rocm[flash-attn]' --no-build-isolation`"),
)
_CDNA = ("gfx90a", "gfx942", "gfx950")
_TESTED_WITH_TRITON = ("gfx90a", "gfx942", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201")


def _ck(request: Request, device: Device) -> Sequence[Reason]:
    if os.environ.get(SWITCH, "FALSE") != "TRUE":
        return ()
    text = f"{SWITCH}=TRUE gives flash-attn its Triton back end"
    return (Reason("disabled_by_env", text, "library", remedy="unset it"),)


def _triton(request: Request, device: Device) -> Sequence[Reason]:
    if os.environ.get(SWITCH, "FALSE") == "TRUE":
        return ()
    text = "flash-attn uses its CK back end"
    return (Reason("disabled_by_env", text, "library", remedy=f"set {SWITCH}=TRUE for the Triton one"),)


_HEADS: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": MultipleOf(8, 8, 256),
    "v_head_dim": SameAs("head_dim"),
    "dtype": OneOf("bfloat16", "float16"),
    "causal": OneOf(True, False),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "deterministic": OneOf(False, True),
}
_CK: Mapping[str, Constraint] = {
    **_HEADS,
    "window": Windows(),
    "alibi": OneOf(False, True),
    "return_lse": OneOf(False, True),
}
_CACHE: Mapping[str, Constraint] = {
    "kv_dtype": SameAs("dtype"),
    "page_size": MultipleOf(128),
    "kv_layout": OneOf("NHD"),
    "max_q_len": Range(1, None, (4,)),
}

Check = Callable[["Request", "Device"], Sequence[Reason]]


def _kernel(
    name: str,
    priority: int,
    archs: tuple[str, ...],
    fields: Mapping[str, Constraint],
    check: Check,
    note: str,
    copies: str = "",
) -> Kernel:
    library, _, phase = name.partition(".")
    return Kernel(
        name=name,
        op="attention",
        phase=phase,
        target=f"hal_rocm._flash_attn:{library.removeprefix('fa2_')}_{phase}",
        priority=priority,
        platforms={"rocm": Archs(only=archs)},
        needs=_NEEDS,
        fields=fields,
        check=check,
        copies=copies,
        evidence={"*": "emulated"},
        note=note,
    )


_GRAD: Mapping[str, Constraint] = {"needs_grad": OneOf(False, True)}

_MORE_QUERIES = "the output of dense batches with queries that see no key (they are put before it)"
_PADDED = "the output, where a plan of fixed size is called with more tokens than its rows have"
_TRITON = "flash-attn, Triton"

KERNELS = (
    _kernel("fa2_ck.prefill", Band.PERFORMANT + 20, _CDNA, {**_CK, **_GRAD}, _ck, "flash-attn, CK", _MORE_QUERIES),
    _kernel("fa2_ck.extend", Band.PERFORMANT + 20, _CDNA, {**_CK, **_CACHE}, _ck, "flash-attn, CK"),
    _kernel("fa2_ck.decode", Band.PERFORMANT + 20, _CDNA, {**_CK, **_CACHE}, _ck, "flash-attn, CK", _PADDED),
    _kernel("fa2_triton.prefill", Band.PERFORMANT, _TESTED_WITH_TRITON, _HEADS, _triton, _TRITON, _MORE_QUERIES),
)
