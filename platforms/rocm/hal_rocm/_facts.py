"""What is fixed for a generation of AMD GPUs: wave, local memory, matrix cores, FP8 flavour.

Sources: LLVM, "User Guide for AMDGPU Backend" (wavefront sizes of the processors; addressable local memory, 160 KiB on
gfx950 and 320 KiB on gfx1250, 64 KiB a work group elsewhere); AMD's CDNA, RDNA3 and RDNA4 instruction set manuals
(MFMA, WMMA); aiter, ``aiter/utility/dtypes.py`` at e4048607 (which e4m3 an arch has). RDNA runs waves of 64 too; 32 is
what compilers use.
"""

from __future__ import annotations

from hal import Arch
from hal_ops import record

__all__ = ["Facts", "facts_of"]

_KIB = 1 << 10


@record(frozen=True)
class Facts:
    """One generation. ``wave`` is in threads, ``lds`` in bytes a work group may have.

    ``matrix`` names the generation of its matrix cores, ``instruction`` their family (``mfma``, ``wmma``); ``fp8`` is
    the flavour of e4m3 that they multiply. Each is empty where there is none.
    """

    wave: int
    lds: int = 64 * _KIB
    matrix: str = ""
    fp8: str = ""

    @property
    def instruction(self) -> str:
        """The family of matrix instructions."""
        return {"cdna": "mfma", "rdna": "wmma", "gfx1": "wmma"}.get(self.matrix[:4], "")

    def capabilities(self) -> frozenset[str]:
        """The facts as names of capabilities."""
        names = {f"wave{self.wave}", f"lds_{self.lds // _KIB}k"}
        if self.matrix:
            names |= {self.instruction, f"{self.instruction}_{self.matrix}"}
        return frozenset(names)

    def properties(self) -> tuple[tuple[str, object], ...]:
        """The facts as properties of a device."""
        return (
            ("wave_size", self.wave),
            ("lds_bytes", self.lds),
            ("matrix_cores", self.matrix or "none"),
            ("fp8_flavour", self.fp8 or "none"),
        )


_TABLE = {
    "gfx906": Facts(64),
    "gfx908": Facts(64, matrix="cdna1"),
    "gfx90a": Facts(64, matrix="cdna2"),
    "gfx942": Facts(64, matrix="cdna3", fp8="e4m3fnuz"),
    "gfx950": Facts(64, 160 * _KIB, matrix="cdna4", fp8="e4m3fn"),
    "gfx1250": Facts(32, 320 * _KIB, matrix="gfx125", fp8="e4m3fn"),
}
_FAMILIES: dict[tuple[int, ...], Facts] = {
    (10, 3): Facts(32),
    (11, 0): Facts(32, matrix="rdna3"),
    (11, 5): Facts(32, matrix="rdna3_5"),
    (12, 0): Facts(32, matrix="rdna4", fp8="e4m3fn"),
}


def facts_of(arch: Arch) -> Facts | None:
    """The facts of an arch; None for one that is not known here, which is given no other one's."""
    if arch.platform != "rocm":
        return None
    return _TABLE.get(arch.name) or _FAMILIES.get(arch.number[:2])
