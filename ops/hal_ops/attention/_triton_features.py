"""What a request means to the Triton attention kernels: compile-time switches and scalar arguments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hal_ops._dtypes import is_fp8
from hal_ops.attention import masks
from hal_ops.attention.request import AttentionRequest

__all__ = ["DTYPES", "Features", "MAX_HEAD_DIM", "check", "cut", "pack_heads"]

DTYPES = ("float16", "bfloat16", "float32")
"""Formats of q, of the output, and of k, v and a cache that is not FP8."""
MAX_HEAD_DIM = 256

_LOG2E = math.log2(math.e)
_SMALLEST = 16
"""Smallest side of a matrix product in Triton."""
_FP8_SMALLEST = 32
"""The same of FP8. Values of 16 columns gave wrong results on an H200 with Triton 3.6."""
_WASTE = 40
"""Heads are packed when at most a fortieth of a tile's rows stays empty."""


def check(request: AttentionRequest, phase: str) -> None:
    """Raise unless the Triton kernels of prefill and extend serve the request.

    Raises:
        ValueError: naming each field that they do not.
    """
    wrong = [
        f"{name} {getattr(request, name)}"
        for name, ok in (
            ("dtype", request.dtype in DTYPES),
            ("kv_dtype", phase == "prefill" or request.kv_dtype == request.dtype or is_fp8(request.kv_dtype)),
            ("head_dim", request.head_dim <= MAX_HEAD_DIM),
            ("v_head_dim", request.v_head_dim <= MAX_HEAD_DIM),
            ("needs_grad", not request.needs_grad),
        )
        if not ok
    ]
    if wrong:
        raise ValueError(
            f"triton.{phase} does not do {', '.join(wrong)}: it takes {', '.join(DTYPES)}, a cache of the same format "
            f"or an FP8 one, and head dims up to {MAX_HEAD_DIM}; use hal_ops.attention.reference, which does everything"
        )


def cut(dim: int) -> tuple[int, int]:
    """A head dim as a power of two plus another (or 0), whichever is less work: 192 is 128 + 64, 112 is 128 + 0."""
    whole = max(_SMALLEST, 1 << (dim - 1).bit_length())
    low = whole // 2
    rest = max(_SMALLEST, 1 << (dim - low - 1).bit_length()) if dim > low else 0
    return (low, rest) if low >= _SMALLEST and low + rest < whole else (whole, 0)


def pack_heads(group: int, rows: int, *, short: bool = False) -> int:
    """How many of a kv head's ``group`` query heads share a tile of ``rows`` rows. ``short`` accepts empty rows."""
    divisors = (d for d in range(min(group, rows), 0, -1) if group % d == 0)
    return next(d for d in divisors if short or rows % d <= rows // _WASTE)


@dataclasses.dataclass(frozen=True)
class Features:
    """The request's part of a launch. ``constants`` are the kernel's upper-case parameters of the same names.

    ``scale`` and ``cap`` are what :func:`hal_ops.attention.triton_common.fold_block` takes.
    """

    left: int
    right: int
    scale: float
    cap: float
    constants: dict[str, Any]

    @classmethod
    def of(cls, request: AttentionRequest, *, padded: bool = False) -> Features:
        """``padded``: head dims become one power of two, whatever that costs, and at least ``_FP8_SMALLEST``."""
        left, right = masks.sides(request.causal, request.window)
        softcap, scale = request.softcap, request.softmax_scale * _LOG2E
        key_cut, value_cut = (
            (cut(dim) if not padded else (max(_FP8_SMALLEST, 1 << (dim - 1).bit_length()), 0))
            for dim in (request.head_dim, request.v_head_dim)
        )
        constants = {
            "HEADS": request.num_q_heads,
            "GROUP": request.group_size,
            "DIM": request.head_dim,
            "CUT": key_cut[0],
            "REST": key_cut[1],
            "V_DIM": request.v_head_dim,
            "V_CUT": value_cut[0],
            "V_REST": value_cut[1],
            "HAS_LEFT": left is not None,
            "HAS_RIGHT": right is not None,
            "SOFTCAP": softcap > 0,
            "ALIBI": request.alibi,
            "SINKS": request.sinks,
            "PLAIN": scale > 0 and not softcap and not request.alibi,
            "PRECISION": "ieee",
        }
        return cls(
            left=left or 0,
            right=right or 0,
            scale=2 * scale / softcap if softcap else scale,
            cap=softcap * _LOG2E,
            constants=constants,
        )
