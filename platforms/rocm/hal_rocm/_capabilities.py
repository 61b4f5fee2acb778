"""What each AMD arch can do.

Sources: those of :mod:`hal_rocm._facts`, and Triton 3.9, ``triton/backends/amd/compiler.py`` (formats that are native
on CDNA3, and on CDNA4 and RDNA4; the archs that it compiles for). RDNA3 has no FP8 arithmetic: aiter lists e4m3fn there
because it converts in software, and so it is not claimed here. ``mxfp4`` are e2m1 values with a scale a block of 32,
multiplied as they are (CDNA4 manual, ``V_MFMA_SCALE_F32_*_F8F6F4``).

An arch that is not known here is said to run Triton and nothing else: Triton compiles for what its LLVM knows, so the
portable kernels are offered, in formats that need no conversion, and no other arch's.
"""

from __future__ import annotations

from hal import Arch
from hal_rocm._facts import facts_of

__all__ = ["capabilities"]

_ANY = frozenset({"fp16", "graph_capture"})
_FORMATS = {
    "e4m3fn": frozenset({"fp8_e4m3fn", "fp8_e5m2", "triton_fp8_e4m3fn", "triton_fp8_e5m2"}),
    "e4m3fnuz": frozenset({"fp8_e4m3fnuz", "fp8_e5m2fnuz", "triton_fp8_e4m3fnuz", "triton_fp8_e5m2fnuz"}),
}
_GFX9 = (9, 4)
"""Triton was never made for what is older, and not for gfx906."""
_FP4 = ("gfx950", "gfx1250")


def capabilities(arch: Arch) -> frozenset[str]:
    """Names of what devices of ``arch`` can do; of an arch that is not known here, whether Triton may be tried."""
    facts = facts_of(arch)
    if facts is None:
        return frozenset({"triton"}) if arch.platform == "rocm" and arch.number >= _GFX9 else frozenset()
    found = _ANY | facts.capabilities() | _FORMATS.get(facts.fp8, frozenset())
    found |= {"bf16"} if facts.matrix else set()
    found |= {"triton"} if arch.name != "gfx906" else set()
    return found | ({"fp4_e2m1", "mxfp4"} if arch.name in _FP4 else set())
