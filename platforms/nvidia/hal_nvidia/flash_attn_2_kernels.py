"""What is declared about flash-attention 2 (distribution ``flash-attn``).

Read from flash-attn 2.7.0 to 2.8.3.post2, ``csrc/flash_attn/flash_api.cpp``, ``flash_attn/flash_attn_interface.py`` and
``setup.py``:

* float16 and bfloat16, cache and queries of one format; head dims up to 256, multiples of 8, equal.
* paged caches have pages of a multiple of 256 tokens; strides are free, so both layouts do.
* windows on both sides, softcap, ALiBi, any scale; no sinks. Causality is aligned to the last key.
* a row without keys has the LSE +inf.
* the forward pass gives the same bits again; the backward pass does if asked to (``deterministic``).
* sources from between 2026-04-16 and 2026-05-12 split the keys of ragged paged calls and lose rows (pull requests 2448 and
  2550). They call themselves 2.8.4, as the mended ones do, so that no version tells them apart.
* archs: ``setup.py`` builds cubins without PTX, for 8.0, and with CUDA 11.8 for 9.0; since 2.7.3 with CUDA 12.8 for 10.0 and
  12.0 too (``FLASH_ATTN_CUDA_ARCHS``). Each runs on later archs of its line. Before 2.7.3 ``flash_api.cpp`` refuses all
  but 8.x and 9.0 besides (``is_sm90 || is_sm8x``).

Band: on 8.x the fastest there is (A100: 225 TFLOP/s forward, the library's README); on 9.0 half as fast as
flash-attention 3, and on 10.0 far behind 4: performant. Extend comes after flashinfer's, which is the same algorithm with
pages of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import hal
from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
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

__all__ = ["KERNELS"]

_ARCHS = Archs(only=("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"))
_HOPPER_CUDA, _BLACKWELL_CUDA = ">=11.8", ">=12.8"
_SINCE_BLACKWELL = ">=2.7.3"
_FLASH_ATTN = Needs(
    "flash-attn",
    ">=2.7",
    install="`pip install 'torch-hal-nvidia[flash-attn]' --no-build-isolation`",
    module="flash_attn_2_cuda",
)


def _built_for(request: Request, device: Device) -> Sequence[Reason]:
    """Why no build of this version, or with this CUDA, has code for the device's arch."""
    arch, found = device.arch, []
    is_blackwell, version = arch.number >= (10, 0), hal.installed("flash-attn")
    wanted = _BLACKWELL_CUDA if is_blackwell else _HOPPER_CUDA if arch.number >= (9, 0) else ""
    if wanted and device.runtime.satisfies(wanted) is False:
        text = f"code for {arch.name} is built with CUDA {wanted} only; this is {device.runtime}"
        found.append(Reason("runtime_too_old", text, "runtime", str(device.runtime), wanted, "install a newer CUDA"))
    if is_blackwell and version is not None and version.satisfies(_SINCE_BLACKWELL) is False:
        text = f"code for {arch.name} needs flash-attn {_SINCE_BLACKWELL}; {version} is installed"
        remedy = f"`pip install 'flash-attn{_SINCE_BLACKWELL}' --no-build-isolation`"
        found.append(Reason("version_too_old", text, "library", str(version), _SINCE_BLACKWELL, remedy))
    return found


_COMMON: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": MultipleOf(8, high=256),
    "v_head_dim": SameAs("head_dim"),
    "dtype": OneOf("bfloat16", "float16"),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softcap": Range(0, None, (30.0,)),
    "alibi": OneOf(False, True),
    "softmax_scale": Anything((0.3,)),
    "return_lse": OneOf(False, True),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}
_FRESH: Mapping[str, Constraint] = {
    "needs_grad": OneOf(False, True),
    "return_lse": Pairs("needs_grad", (False, False), (False, True), (True, False)),
}
_PAGED: Mapping[str, Constraint] = {
    "kv_dtype": SameAs("dtype"),
    "page_size": MultipleOf(256),
    "kv_layout": OneOf("NHD", "HND"),
    "max_q_len": Range(1, None, (4,)),
}


def _kernel(
    phase: str,
    more: Mapping[str, Constraint],
    rank: int,
    copies: str = "",
    copies_with: Mapping[str, str] = MappingProxyType({}),
) -> Kernel:
    return Kernel(
        name=f"fa2.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_nvidia._flash_attn_2:{phase}",
        priority=Band.PERFORMANT + rank,
        platforms={"nvidia": _ARCHS},
        needs=(Needs("torch", ">=2.6"), _FLASH_ATTN),
        fields={**_COMMON, **more},
        check=_built_for,
        copies=copies,
        copies_with=copies_with,
        row_alignment=16,
        evidence={"*": "emulated"},
        note="flash-attention 2",
    )


_PADDED = "the output, where a plan of fixed size is called with more tokens than its rows have"

_FAR = {
    "needs_grad": "dense q, k or v whose sequences do not follow each other, where gradients of q take 2**31 numbers or more"
}

KERNELS = (
    _kernel("prefill", _FRESH, 50, copies_with=_FAR),
    _kernel("extend", _PAGED, 25),
    _kernel("decode", _PAGED, 50, _PADDED),
)
