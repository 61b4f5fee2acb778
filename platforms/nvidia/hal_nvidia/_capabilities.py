"""What each NVIDIA arch can do.

Sources: PTX ISA 9.0 (target requirements of ``mma``, ``wgmma``, ``tcgen05``, ``cp.async.bulk.tensor``, and ``cvt`` to
e4m3x2 and e2m1x2); CUDA programming guide 13.x, appendix "Compute Capabilities"; Triton 3.6 to 3.9,
``triton/backends/nvidia/compiler.py`` (``supported_fp8_dtypes``: e5m2 always, e4m3 from 8.9) and its README (8.0 and
newer); CUTLASS 4.x, "SM120 GeForce": clusters there hold one block.
"""

from __future__ import annotations

from hal import Arch

__all__ = ["capabilities"]

_VOLTA = frozenset({"fp16", "graph_capture"})
_AMPERE = _VOLTA | {"bf16", "tf32", "triton", "triton_fp8_e5m2"}
_ADA = _AMPERE | {"fp8_e4m3fn", "fp8_e5m2", "triton_fp8_e4m3fn"}
_SINCE_HOPPER = _ADA | {"tma"}
_BLACKWELL = _SINCE_HOPPER | {"cluster", "tcgen05", "fp4_e2m1"}

_TABLE: dict[tuple[int, ...], frozenset[str]] = {
    (7, 0): _VOLTA,
    (7, 2): _VOLTA,
    (7, 5): _VOLTA,
    (8, 0): _AMPERE,
    (8, 6): _AMPERE,
    (8, 7): _AMPERE,
    (8, 9): _ADA,
    (9, 0): _SINCE_HOPPER | {"cluster", "wgmma"},
    (10, 0): _BLACKWELL,
    (10, 1): _BLACKWELL,
    (10, 3): _BLACKWELL,
    (11, 0): _BLACKWELL,
    (12, 0): _SINCE_HOPPER | {"fp4_e2m1"},
    (12, 1): _SINCE_HOPPER | {"fp4_e2m1"},
}


def capabilities(arch: Arch) -> frozenset[str]:
    """Names of what devices of ``arch`` can do.

    An arch that the table lacks gets what forward-compatible PTX promises it: the features of the newest listed
    arch at or below it that are not specific to one arch (so no ``wgmma``, ``tcgen05``, ``cluster`` or ``fp4_e2m1``).
    """
    if arch.platform != "nvidia" or arch.line != "sm":
        return frozenset()
    if arch.number in _TABLE:
        return _TABLE[arch.number]
    older = [number for number in _TABLE if number < arch.number]
    if not older:
        return frozenset()
    return _TABLE[max(older)] & _SINCE_HOPPER
