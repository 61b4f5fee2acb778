"""Tile sizes of the Triton decode kernel, as data.

A configuration is for tiles of up to ``rows`` pairs of a query token and a query head, for keys and values of together up
to ``dims`` elements (each padded to a power of two), of ``item`` bytes each. ``stages`` is one more than the buffers for
blocks of both.

Chosen by measuring on an H200 (``benchmarks/attention.py --only decode``); for other archs by what fits their shared
memory. An unknown arch gets the smallest, which fits 64 KiB.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

__all__ = ["CONFIGS", "Config", "DEFAULT", "config_of", "configs_of"]


@dataclasses.dataclass(frozen=True)
class Config:
    """One configuration.

    ``block``: keys at a time. ``fill``: programs a multiprocessor that keep the memory busy; ``resident``: that it runs
    at a time.
    """

    rows: int
    dims: int
    item: int
    block: int
    warps: int
    stages: int
    fill: float = 1.5
    resident: int = 2


HOPPER = (
    Config(16, 128, 2, 64, 2, 3, 3, 6),
    Config(16, 256, 2, 64, 4, 3, 1.5, 3),
    Config(16, 512, 2, 32, 4, 3),
    Config(32, 256, 2, 64, 4, 3),
    Config(32, 512, 2, 32, 4, 3),
    Config(64, 256, 2, 64, 4, 3),
    Config(64, 512, 2, 32, 8, 3),
    Config(16, 256, 1, 128, 4, 3),
    Config(16, 512, 1, 64, 4, 3),
    Config(64, 256, 1, 64, 8, 3),
    Config(64, 512, 1, 64, 8, 3),
    Config(16, 256, 4, 16, 4, 3),
    Config(16, 512, 4, 16, 8, 3),
)
AMPERE = (*HOPPER[:10], Config(64, 512, 1, 32, 8, 3), *HOPPER[11:])
DEFAULT = (
    Config(16, 256, 1, 32, 4, 2),
    Config(16, 512, 1, 32, 4, 2),
    Config(32, 256, 1, 32, 8, 2),
    Config(16, 256, 2, 32, 4, 2),
    Config(16, 512, 2, 16, 4, 2),
    Config(32, 256, 2, 32, 8, 2),
    Config(16, 256, 4, 16, 4, 2),
    Config(16, 512, 4, 16, 8, 2),
)
RDNA = (
    Config(16, 256, 1, 32, 8, 2),
    Config(16, 512, 1, 16, 8, 2),
    Config(16, 256, 2, 32, 8, 2),
    Config(16, 512, 2, 16, 16, 2),
    Config(16, 256, 4, 16, 8, 2),
    Config(16, 512, 4, 16, 16, 2),
)
CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_80": AMPERE,
    "sm_90": HOPPER,
    "sm_10?": HOPPER,
    "gfx1[12]*": RDNA,
}
"""Tables by arch, as shell patterns."""


def configs_of(arch: str) -> tuple[Config, ...]:
    """The table of an arch."""
    return next((table for pattern, table in CONFIGS.items() if fnmatchcase(arch, pattern)), DEFAULT)


def config_of(arch: str, rows: int, dims: int, item: int) -> Config:
    """The first configuration of the arch for ``rows`` rows, ``dims`` elements of keys and values, by their size.

    Where all are for less rows, the one for the most: the rows then take several tiles.

    Raises:
        ValueError: there is none; the heads are too long for this kernel.
    """
    fit = [c for c in configs_of(arch) if dims <= c.dims and item == c.item]
    if not fit:
        raise ValueError(f"no configuration for heads of together {dims} elements of {item} bytes in keys and values")
    return next((c for c in fit if rows <= c.rows), max(fit, key=lambda c: c.rows))
