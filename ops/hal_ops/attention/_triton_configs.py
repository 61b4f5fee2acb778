"""Tile sizes of the Triton prefill and extend kernels, as data. Nothing is tuned at run time.

Those of sm_90 are the fastest of a sweep on an H200 (``benchmarks/attention.py --sweep``); those of other archs follow
from their shared memory, registers and matrix instructions, and are compiled ahead of time for each. An unknown arch
gets the smallest, which fits 64 KiB of shared memory.

A row serves the archs that it stands under, no others: that of gfx942 for heads of 128, compiled for sm_90 by Triton 3.6
with its own ptxas (12.8.93), gave wrong values and illegal reads at head dim 80, and right ones with the ptxas of CUDA 13.0
(seen on an H200; all rows of NVIDIA's archs were right with both).
"""

from __future__ import annotations

import dataclasses

from hal_ops._dtypes import is_fp8
from hal_ops.attention._triton_features import cut
from hal_ops.attention.request import AttentionRequest

__all__ = ["Config", "DEFAULT", "HOPPER_EXTEND", "HOPPER_PREFILL", "Hopper", "TABLE", "WIDE", "config_of", "hopper_of"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of ``block_m`` rows and ``block_n`` keys, for heads of up to ``dim`` elements."""

    dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Hopper:
    """Tiles of ``block_n`` keys in :mod:`hal_ops.attention.triton_hopper`, for heads of up to ``dim`` and ``v_dim``.

    ``parts`` groups of four warps take 64 rows each, one copies; its threads have ``registers``, the others the rest.
    """

    dim: int
    v_dim: int
    block_n: int
    parts: int
    registers: int

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 * self.parts


_ROOMY = (Config(64, 128, 64, 4, 3), Config(128, 128, 128, 8, 3), Config(256, 128, 64, 8, 2))
_MIDDLE = (Config(64, 128, 64, 4, 3), Config(128, 128, 64, 8, 2), Config(256, 128, 32, 8, 2))
_TIGHT = (Config(64, 128, 64, 4, 2), Config(128, 128, 32, 8, 2), Config(256, 64, 32, 4, 2))
_SMALL = (Config(128, 128, 64, 4, 1), Config(256, 64, 32, 4, 1))

TABLE: dict[str, tuple[Config, ...]] = {
    "sm_80": _MIDDLE,
    "sm_86": _TIGHT,
    "sm_89": _TIGHT,
    "sm_90": _ROOMY,
    "sm_100": _ROOMY,
    "sm_103": _ROOMY,
    "sm_120": _TIGHT,
    "sm_121": _TIGHT,
    "gfx90a": _SMALL,
    "gfx942": _SMALL,
    "gfx950": _MIDDLE,
}
"""16-bit formats, by arch, in order of ``dim``."""
DEFAULT = (Config(128, 64, 32, 4, 1), Config(256, 32, 32, 4, 1))
WIDE = (Config(64, 64, 32, 4, 1), Config(128, 32, 32, 4, 1), Config(256, 32, 16, 4, 1))
"""float32, on every arch: its products are not made by matrix units."""
HOPPER_PREFILL = (
    Hopper(64, 64, 128, 3, 32),
    Hopper(128, 128, 128, 2, 88),
    Hopper(192, 128, 128, 2, 88),
    Hopper(256, 256, 64, 2, 24),
)
HOPPER_EXTEND = (Hopper(128, 128, 128, 2, 88), Hopper(192, 128, 128, 2, 88), Hopper(256, 256, 64, 2, 24))
"""Of two parts alone, so that the kernel for every arch can serve a plan too."""


def config_of(arch: str, request: AttentionRequest) -> Config:
    """The configuration for a request.

    Raises:
        ValueError: the heads are too long for these kernels.
    """
    dim = max(request.head_dim, request.v_head_dim)
    for config in WIDE if request.dtype == "float32" else TABLE.get(arch, DEFAULT):
        if dim <= config.dim:
            return config
    raise ValueError(f"head_dim {dim}: these kernels take at most 256")


def hopper_of(arch: str, request: AttentionRequest, *, cached: bool) -> Hopper | None:
    """The configuration of the kernel made for this arch, if it is and if it serves the request."""
    dims = (request.head_dim, request.v_head_dim)
    whole = all(sum(cut(dim)) == dim for dim in dims)
    if arch != "sm_90" or request.dtype == "float32" or not whole or (cached and is_fp8(request.kv_dtype)):
        return None
    table = HOPPER_EXTEND if cached else HOPPER_PREFILL
    return next((c for c in table if dims[0] <= c.dim and dims[1] <= c.v_dim), None)
