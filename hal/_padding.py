"""Tokens of no row: what a call may bring more than its step has, where the plan is of maximum size. Their results are 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cleared", "lengthened"]


def lengthened(found: Any, tokens: int) -> Any:
    """Results of a step's own tokens, and behind them 0 (an LSE of -inf) up to so many ``tokens``."""
    if isinstance(found, tuple):
        return _longer(found[0], tokens, 0.0), _longer(found[1], tokens, float("-inf"))
    return _longer(found, tokens, 0.0)


def _longer(x: Tensor, tokens: int, value: float) -> Tensor:
    made = x.new_full((tokens, *x.shape[1:]), value)
    made[: x.shape[0]] = x
    return made


def cleared(found: Any, slots: Tensor) -> Any:
    """Results in place, with 0 (an LSE of -inf) for tokens without a slot. A graph's replay asks the slots anew."""
    none = slots < 0
    if isinstance(found, tuple):
        return found[0].masked_fill_(none[:, None, None], 0.0), found[1].masked_fill_(none[:, None], float("-inf"))
    return found.masked_fill_(none[:, None, None], 0.0)
