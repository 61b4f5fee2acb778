"""``RowRequest``: what the requests of ops over rows of ``hidden_size`` elements have in common."""

from __future__ import annotations

import math
from typing import Any

from hal_ops._checks import flag, positive
from hal_ops._dtypes import dtype_name, is_fp8
from hal_ops._record import record
from hal_ops._request import Request, feature, required

__all__ = ["RowRequest", "finite", "float_format"]


@record(frozen=True, kw_only=True)
class RowRequest(Request):
    """Fields of an op over the last dim of ``[..., hidden_size]``.

    Fields:
        hidden_size: elements a row. dtype: format of the inputs and, unless the op says otherwise, of the output.
        deterministic: equal inputs give equal bits; graph: calls can be captured; needs_grad: gradients reach the inputs.

    Raises:
        ValueError: a value that no kernel could honour.
    """

    hidden_size: int = required()
    dtype: str = required(default="bfloat16", code="dtype")
    deterministic: bool = feature(False)
    graph: bool = feature(False)
    needs_grad: bool = feature(False)

    def __post_init__(self) -> None:
        positive("hidden_size", self.hidden_size)
        object.__setattr__(self, "dtype", float_format("dtype", self.dtype))
        for name in ("deterministic", "graph", "needs_grad"):
            flag(name, getattr(self, name))


def float_format(name: str, value: Any) -> str:
    """The exact name of a float format of at least 16 bits.

    Raises:
        ValueError: it is no such format.
    """
    found = dtype_name(value)
    if is_fp8(found) or found == "int8":
        raise ValueError(f"{name}={found}: give float16, bfloat16, float32 or float64")
    return found


def finite(name: str, value: Any, *, least: float = -math.inf) -> float:
    """A finite number of at least ``least``.

    Raises:
        ValueError: it is none.
    """
    number = float(value)
    if not (math.isfinite(number) and number >= least):
        floor = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name}={value!r}: give a finite number{floor}")
    return number
