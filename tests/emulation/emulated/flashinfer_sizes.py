"""Bytes that flashinfer's plans take of their float buffer (0.6.13, ``include/flashinfer/attention/scheduler.cuh``).

Each is the most that a plan of any lengths takes: without a graph, plans share one buffer. ``PrefillSM90Plan`` takes none.
"""

from __future__ import annotations

import functools

from emulated import hardware

__all__ = ["decode_plan", "mla_plan", "prefill_plan"]

_FLOAT = 4
_UNSIGNED = 1 << 32


@functools.cache
def _processors(arch: str) -> int:
    found = hardware.device_of(arch).multiprocessors
    assert found is not None
    return found


def _tile(packed: int, dim: int) -> int:
    """``FA2DetermineCtaTileQ``, from sm_80 on."""
    if packed > 64 and dim < 256:
        return 128
    return 64 if packed > 16 else 16


def prefill_plan(arch: str, heads: tuple[int, int], dim: int, *, rows: int | None = None, batch: int = 0) -> int:
    """``PrefillPlan``: v and s of every tile of queries, where keys are split.

    ``rows``: those that a graph is captured for (``total_num_rows``). A graph splits always, over tiles of a size by the
    longest sequence that there can be, which is counted in 32 bits without a sign.
    """
    q_heads, kv_heads = heads
    group, in_flight = q_heads // kv_heads, 2 * _processors(arch) // kv_heads
    if rows is None:
        tile, padded = _tile(_UNSIGNED, dim), in_flight
    else:
        tile = _tile((rows - batch + 1) % _UNSIGNED * group, dim)
        padded = max(in_flight, -(-rows * group // tile) + batch - 1)
    return q_heads * padded * tile * (dim + 1) * _FLOAT


def decode_plan(arch: str, heads: tuple[int, int], dim: int) -> int:
    """``DecodePlan``: v and s of every block, of which a processor holds up to 16 of 128 threads."""
    q_heads, kv_heads = heads
    return q_heads * (16 * _processors(arch) // kv_heads) * (dim + 1) * _FLOAT


def mla_plan(arch: str, packed: int, batch: int, dim: int) -> int:
    """``MLAPlan``: two outputs of 16 bits and LSEs a cluster, of one block or two of 64 rows. ``packed``: queries times
    heads."""
    cluster = 2 if packed // batch > 64 else 1
    rows = 2 * (_processors(arch) // cluster) * cluster * 64
    return rows * 2 * dim + rows * _FLOAT
