"""How flashinfer's functions treat the memory that they are given (flashinfer 0.6.13 to 0.7.4).

* Those with semaphores want zeros in the first 8 MiB of their buffer, and leave them there: xqa, and trtllm-gen's decode
  before 0.6.15. Behind that they leave anything.
* The others leave anything anywhere. With an LSE, trtllm-gen begins with statistics: 8 bytes for each query that a row
  may have, rounded up to 256, and 1 MiB more (``csrc/trtllm_fmha_kernel_launcher.cu``).
* Where keys are split, trtllm-gen's decode keeps behind that a maximum and a sum, 8 bytes, and an output of each row of each
  block: one block a processor, of two tiles of 128 rows at most (``kernelParams.h``, ``ptrPartialStats``).
* Since 0.6.15 trtllm-gen's functions take counters, and make and zero them in each call without.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["ABSENT", "partial_results", "scratched", "statistics", "with_counters", "with_semaphores"]

MIB = 1 << 20
FRONT = 8 * MIB
ABSENT: Any = object()
"""An argument that a version has no parameter for."""
_GARBAGE = 0xAB
_PROCESSORS = 148


def statistics(heads: int, rows: int, longest: int, wanted: bool) -> int:
    """Bytes that trtllm-gen takes for an LSE."""
    return 8 * heads * rows * -(-longest // 256) * 256 + MIB if wanted else 0


def partial_results(dim: int) -> int:
    """Bytes that trtllm-gen's decode takes where it splits keys, over values of ``dim``."""
    return _PROCESSORS * 2 * 128 * (8 + 4 * dim)


def scratched(buffer: Tensor, needed: int = 0) -> None:
    """A buffer that the function leaves anything in."""
    assert buffer.numel() >= max(16, needed), "buffer overflow when allocating memory"
    buffer[:256] = _GARBAGE


def with_semaphores(buffer: Tensor, needed: int = 0) -> None:
    """A buffer whose front is zero, before and after."""
    assert buffer.numel() > FRONT + needed, "buffer overflow when allocating memory"
    assert not buffer[:FRONT].any(), "the front of the work buffer must be zero"
    buffer[FRONT : FRONT + 256] = _GARBAGE


def with_counters(buffer: Tensor, counters: Any, heads: int, rows: int, needed: int, *, splits: bool = True) -> None:
    """The memory of trtllm-gen. ``splits``: it is a decode function's, which counts."""
    if counters is ABSENT:
        (with_semaphores if splits else scratched)(buffer, needed)
        return
    assert counters is not None, "a buffer is made and zeroed in this call"
    assert counters.numel() >= 4 * -(-max(rows * heads, _PROCESSORS) // 8) * 8, (
        "multi_ctas_kv_counter_buffer is too small"
    )
    assert counters.data_ptr() % 16 == 0
    assert not counters.any(), "counters must be zero"
    scratched(buffer, needed)
