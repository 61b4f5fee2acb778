"""What each AMD arch can do.

Sources: aiter, ``aiter/utility/dtypes.py`` and ``aiter/jit/utils/chip_info.py`` at e4048607 (which e4m3 an arch has);
Triton 3.9, ``triton/backends/amd/compiler.py`` (formats that are native on CDNA3, and on CDNA4 and RDNA4); AMD's CDNA3,
CDNA4, RDNA3 and RDNA4 instruction set manuals (MFMA, WMMA, block-scaled formats). RDNA3 has no FP8 arithmetic: aiter
lists e4m3fn there because it converts in software, and so it is not claimed here.
"""

from __future__ import annotations

from hal import Arch

__all__ = ["capabilities"]

_BASE = frozenset({"fp16", "graph_capture"})
_OCP_FP8 = frozenset({"fp8_e4m3fn", "fp8_e5m2", "triton_fp8_e4m3fn", "triton_fp8_e5m2"})
_FNUZ_FP8 = frozenset({"fp8_e4m3fnuz", "fp8_e5m2fnuz", "triton_fp8_e4m3fnuz", "triton_fp8_e5m2fnuz"})
_MFMA = _BASE | {"bf16", "mfma", "triton"}
_WMMA = _BASE | {"bf16", "wmma", "triton"}

_TABLE: dict[str, frozenset[str]] = {
    "gfx906": _BASE,
    "gfx908": _MFMA,
    "gfx90a": _MFMA,
    "gfx942": _MFMA | _FNUZ_FP8,
    "gfx950": _MFMA | _OCP_FP8 | {"fp4_e2m1"},
    "gfx1250": _WMMA | _OCP_FP8 | {"fp4_e2m1"},
}
_FAMILIES: dict[tuple[int, int], frozenset[str]] = {
    (10, 3): _BASE | {"triton"},
    (11, 0): _WMMA,
    (11, 5): _WMMA,
    (12, 0): _WMMA | _OCP_FP8,
}


def capabilities(arch: Arch) -> frozenset[str]:
    """Names of what devices of ``arch`` can do; empty for an arch that is not known here."""
    if arch.platform != "rocm":
        return frozenset()
    return _TABLE.get(arch.name) or _FAMILIES.get(arch.number[:2], frozenset())  # type: ignore[arg-type]
