"""Tile sizes of the Triton kernel of latent attention, as data: by what fits registers and shared memory.

A configuration is for tiles of up to ``rows`` pairs of a query token and a head, over entries of ``item`` bytes an
element (float32 queries: 4, whatever the cache is). A block of an FP8 cache is converted in registers: its programs have
more of them. None is measured. With latents of 512 tiles of 64 rows spill registers everywhere
(``docs/_data/triton_aot.json`` has those that do not).
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

__all__ = ["CONFIGS", "Config", "DEFAULT", "config_of", "configs_of"]


@dataclasses.dataclass(frozen=True)
class Config:
    """One configuration.

    ``block``: entries at a time. ``stages``: one more than the buffers for blocks. ``fill``: programs a multiprocessor
    that keep the memory busy; ``resident``: that it runs at a time.
    """

    rows: int
    item: int
    block: int
    warps: int
    stages: int
    fill: float = 1.0
    resident: int = 1


HOPPER = (
    Config(16, 2, 32, 4, 3, 2, 2),
    Config(32, 2, 64, 8, 3),
    Config(16, 1, 32, 4, 3, 2, 2),
    Config(32, 1, 64, 8, 3),
    Config(16, 4, 16, 8, 2),
)
NVIDIA = (
    Config(16, 2, 32, 4, 3),
    Config(32, 2, 32, 8, 3),
    Config(16, 1, 32, 8, 3),
    Config(32, 1, 32, 8, 3),
    Config(16, 4, 16, 8, 2),
)
CONSUMER = (
    Config(16, 2, 16, 4, 2, 2, 2),
    Config(32, 2, 32, 8, 2),
    Config(16, 1, 16, 4, 2, 2, 2),
    Config(32, 1, 32, 8, 2),
    Config(16, 4, 16, 8, 2),
)
CDNA = (
    Config(16, 2, 16, 4, 2),
    Config(32, 2, 16, 4, 2),
    Config(16, 1, 16, 4, 2),
    Config(32, 1, 16, 4, 2),
    Config(16, 4, 16, 4, 2),
)
RDNA = (
    Config(16, 2, 16, 16, 2),
    Config(16, 1, 16, 8, 2),
    Config(16, 4, 16, 16, 2),
)
DEFAULT = (
    Config(16, 2, 16, 4, 2),
    Config(16, 1, 16, 4, 2),
    Config(16, 4, 16, 4, 2),
)
CONFIGS: dict[str, tuple[Config, ...]] = {
    "sm_90": HOPPER,
    "sm_80": NVIDIA,
    "sm_10?": NVIDIA,
    "sm_*": CONSUMER,
    "gfx9*": CDNA,
    "gfx1[12]*": RDNA,
}
"""Tables by arch, as shell patterns. Any other arch gets the smallest tiles, which fit 64 KiB (float32: 74 KiB)."""


def configs_of(arch: str) -> tuple[Config, ...]:
    """The table of an arch."""
    return next((table for pattern, table in CONFIGS.items() if fnmatchcase(arch, pattern)), DEFAULT)


def config_of(arch: str, rows: int, item: int) -> Config:
    """The first configuration for ``rows`` rows of ``item`` bytes an element; where all are for less, the largest."""
    fit = [c for c in configs_of(arch) if c.item == item]
    return next((c for c in fit if rows <= c.rows), max(fit, key=lambda c: c.rows))
