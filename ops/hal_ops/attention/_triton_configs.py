"""Tile sizes of the Triton prefill and extend kernels, as data. Nothing is tuned at run time.

Those of sm_90 are the fastest of a sweep on an H200; those of other archs follow
from their shared memory, registers and matrix instructions, and are compiled ahead of time for each
(``docs/triton-resources.md``). An unknown arch gets the smallest, which fits 64 KiB of shared memory.

AMD: waves are 64 threads on CDNA and 32 on RDNA, so 8 warps there are 4 here. A thread has 512 registers on CDNA, 256
on RDNA, and the matrix instructions of gfx11 want their operands twice, in both halves of a wave ("RDNA3 Instruction
Set Architecture", WMMA): its tiles are the smallest, and with heads of 256 it spills whatever they are.

A row serves the archs that it stands under, no others: that of gfx942 for heads of 128, compiled for sm_90 by Triton 3.6
with its own ptxas (12.8.93), gave wrong values and illegal reads at head dim 80, and right ones with the ptxas of CUDA 13.0
(seen on an H200; the rows of sm_90 were right with both).
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from hal_ops._dtypes import is_fp8
from hal_ops.attention._triton_features import cut
from hal_ops.attention.request import AttentionRequest

__all__ = [
    "Config",
    "DEFAULT",
    "HOPPER_EXTEND",
    "HOPPER_FP8",
    "HOPPER_FP8_CACHE",
    "HOPPER_PLAIN",
    "HOPPER_PREFILL",
    "HOPPER_ROWS",
    "Hopper",
    "TABLE",
    "WIDE",
    "config_of",
    "configs_of",
    "hopper_of",
    "in_boxes",
    "keys_as_they_are",
    "padded_on",
]


_REGISTERS = 65536
"""Of a Hopper multiprocessor."""


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

    Fields:
        turns: groups take turns to multiply, see :mod:`hal_ops.attention._hopper_turns`.
        short: maxima and sums of a row are made in shorter chains.
    """

    dim: int
    v_dim: int
    block_n: int
    parts: int
    registers: int
    turns: bool = False
    short: bool = False

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 * self.parts

    @property
    def most_registers(self) -> int:
        """Of a thread, before groups of warps share them out; one tile takes all that a multiprocessor has."""
        return _REGISTERS // (128 * (self.parts + 1)) // 8 * 8

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's parameters of these names."""
        registers = (self.most_registers * (self.parts + 1) - self.registers) // self.parts
        return {
            "PARTS": self.parts, "REGISTERS": registers, "COPY_REGISTERS": self.registers, "TURNS": self.turns,
            "SHORT": self.short,
        }  # fmt: skip


_ROOMY = (Config(64, 128, 64, 4, 3), Config(128, 128, 128, 8, 3), Config(256, 128, 64, 8, 2))
_LARGE = (Config(64, 128, 64, 4, 3), Config(128, 128, 64, 8, 3), Config(256, 64, 64, 8, 2))
_MIDDLE = (Config(64, 128, 64, 8, 3), Config(128, 128, 32, 8, 3), Config(256, 64, 32, 8, 2))
_TIGHT = (Config(64, 128, 64, 8, 2), Config(128, 64, 32, 4, 2), Config(256, 64, 32, 8, 2))
_CDNA = (Config(128, 128, 64, 4, 1), Config(256, 64, 32, 4, 1))
_CDNA4 = (Config(64, 128, 64, 4, 3), Config(128, 128, 64, 4, 2), Config(256, 64, 32, 8, 2))
_RDNA3 = (Config(64, 128, 32, 8, 1), Config(128, 64, 16, 8, 1), Config(256, 32, 16, 16, 1))
_RDNA4 = (Config(64, 128, 32, 8, 1), Config(128, 128, 32, 8, 1), Config(256, 64, 32, 8, 1))

TABLE: dict[str, tuple[Config, ...]] = {
    "sm_80": _MIDDLE,
    "sm_86": _TIGHT,
    "sm_89": _TIGHT,
    "sm_90": _ROOMY,
    "sm_100": _LARGE,
    "sm_103": _LARGE,
    "sm_120": _TIGHT,
    "sm_121": _TIGHT,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA4,
    "gfx11*": _RDNA3,
    "gfx120*": _RDNA4,
}
"""16-bit formats, by arch (a shell pattern), in order of ``dim``."""
DEFAULT = (Config(128, 64, 32, 4, 1), Config(256, 32, 32, 4, 1))
WIDE = (Config(64, 64, 32, 4, 1), Config(128, 32, 32, 4, 1), Config(256, 32, 16, 4, 1))
"""float32, but on RDNA: its products are not made by matrix units."""
WIDE_RDNA = (Config(64, 32, 16, 8, 1), Config(128, 16, 16, 16, 1), Config(256, 32, 16, 16, 1))
"""The same for 256 registers a thread; heads of 256 spill whatever the tile is."""
HOPPER_PREFILL = (
    Hopper(64, 64, 128, 3, 32, short=True),
    Hopper(128, 128, 128, 2, 40, turns=True),
    Hopper(192, 128, 128, 2, 88),
    Hopper(256, 256, 64, 2, 24),
)
HOPPER_FP8 = Hopper(128, 128, 128, 2, 88)
"""Prefill of FP8 q, k and v, for heads of 128 alone: others were not run."""
HOPPER_EXTEND = (
    Hopper(64, 64, 128, 2, 88),
    Hopper(128, 128, 128, 2, 40, turns=True),
    Hopper(192, 128, 128, 2, 88),
    Hopper(256, 256, 64, 2, 24),
)
"""Of two parts alone, so that the kernel for every arch can serve a plan too."""
HOPPER_PLAIN = Hopper(128, 128, 128, 2, 88)
"""Where turns do not pay, and with a Triton that they were not run with."""
HOPPER_FP8_CACHE = (Hopper(64, 64, 128, 2, 88), Hopper(128, 128, 128, 2, 88))
"""For FP8 caches, of heads of these two dims alone: others were not run."""
HOPPER_ROWS = (HOPPER_PLAIN, *HOPPER_EXTEND[2:])
"""For pages that hold no whole blocks, which the copying warps copy row by row: they need more registers."""
_OCP = ("float8_e4m3fn", "float8_e5m2")
FP8_PRODUCTS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "sm_89": (_OCP, 32, 256),
    "sm_90": (_OCP, 64, 128),
    "sm_1[0-9]*": (_OCP, 32, 256),
    "gfx942": (("float8_e4m3fnuz", "float8_e5m2fnuz"), 32, 256),
    "gfx950": (_OCP, 32, 128),
    "gfx12*": (_OCP, 32, 256),
}
"""Formats that matrix units multiply, by arch (a shell pattern), and the shortest and longest heads for which a prefill has
them do so: on sm_90 those that were run on an H200 and were right; on gfx950 longer ones would spill registers.

"PTX ISA", mma, wgmma, tcgen05; "AMD Instinct MI300 Instruction Set Architecture" and "CDNA4", MFMA; "RDNA4 Instruction Set
Architecture", WMMA. Sums are float32, but on sm_90 keep 14 bits: that is off by less than weights are in 16 bits."""
_FP8_COLUMNS = 32
"""Fewest columns of such a product in Triton."""


def configs_of(arch: str, *, wide: bool = False) -> tuple[Config, ...]:
    """The configurations of an arch in order of ``dim``, for 16-bit formats or (``wide``) for float32."""
    if wide:
        return WIDE_RDNA if fnmatchcase(arch, "gfx1[12]*") else WIDE
    return next((table for pattern, table in TABLE.items() if fnmatchcase(arch, pattern)), DEFAULT)


def config_of(arch: str, request: AttentionRequest) -> Config:
    """The configuration for a request.

    Raises:
        ValueError: the heads are too long for these kernels.
    """
    dim = max(request.head_dim, request.v_head_dim)
    for config in configs_of(arch, wide=request.dtype == "float32"):
        if dim <= config.dim:
            return config
    raise ValueError(f"head_dim {dim}: these kernels take at most 256")


def padded_on(arch: str, request: AttentionRequest, *, cached: bool) -> bool:
    """Whether head dims are padded to one power of two for the kernels that serve every arch.

    On an H200 with Triton 3.6.0 heads of two parts, the second of which is not full (36, 40, 44, 72, 132, 136), gave wrong
    values and illegal reads in bfloat16 and float16, in most of prefill and extend; padded they were right, and so were 80,
    96, 160 and 192, whose parts are full. FP8 keys of two parts (80, 96) gave wrong values too, those of one part right
    ones, if of 32 columns or more. With the first tile of :data:`DEFAULT` heads of 96 in two parts read illegally in 16
    bits too; 80, 112 and two stages were right in both forms. So all are padded on an arch that nobody has named, and FP8 on
    every arch: it has been run on no other.
    """
    unnamed = not any(fnmatchcase(arch, pattern) for pattern in TABLE)
    partial = any(sum(cut(dim)) != dim for dim in (request.head_dim, request.v_head_dim))
    return unnamed or partial or is_fp8(_read(request, cached))


def keys_as_they_are(arch: str, request: AttentionRequest, *columns: int) -> bool:
    """Whether a prefill multiplies FP8 q and k without converting them, in products of so many ``columns`` (0 is none).

    Not for a float32 output, which is meant to be exact.
    """
    known = (row for pattern, row in FP8_PRODUCTS.items() if fnmatchcase(arch, pattern))
    formats, shortest, longest = next(known, ((), 0, 0))
    fits = shortest <= request.head_dim <= longest and all(n == 0 or n >= _FP8_COLUMNS for n in columns)
    return request.qkv_dtype in formats and request.dtype != "float32" and fits


def _read(request: AttentionRequest, cached: bool) -> str:
    return request.kv_dtype if cached else request.qkv_dtype


def hopper_of(arch: str, request: AttentionRequest, *, cached: bool) -> Hopper | None:
    """The configuration of the kernel made for this arch, if it is and if it serves the request."""
    dims = (request.head_dim, request.v_head_dim)
    whole = all(sum(cut(dim)) == dim for dim in dims)
    if arch != "sm_90" or request.dtype == "float32" or not whole:
        return None
    if is_fp8(_read(request, cached)):
        table = HOPPER_FP8_CACHE if cached else (HOPPER_FP8,)
        known = (config for config in table if dims == (config.dim, config.v_dim))
        return next(known, None) if _read(request, cached) in _OCP else None
    found = _fitting(HOPPER_EXTEND if cached else HOPPER_PREFILL, dims)
    if cached and found is not None and not in_boxes(found, request):
        return _fitting(HOPPER_ROWS, dims)
    return found


def _fitting(table: tuple[Hopper, ...], dims: tuple[int, int]) -> Hopper | None:
    return next((config for config in table if dims[0] <= config.dim and dims[1] <= config.v_dim), None)


def rounds_queries(request: AttentionRequest) -> bool:
    """Whether the kernel for Hopper rounds q to the format of an FP8 cache, and multiplies keys as they are.

    Not to ``float8_e5m2``, whose two bits leave scores of outliers off by more than the weights of 16 bits are.
    """
    return request.fp8_query and request.kv_dtype == "float8_e4m3fn"


def in_boxes(config: Hopper, request: AttentionRequest) -> bool:
    """Whether the copy engine copies from the pages of a cache: they hold whole blocks."""
    return int(request.page_size) % config.block_n == 0
