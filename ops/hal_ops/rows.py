"""Rows of a tensor: its leading dims folded, so that kernels take views without copying them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Rows",
    "empty_like",
    "fold",
    "half_of",
    "no_outputs",
    "refuse_grad",
    "unfolded",
]


class Rows(NamedTuple):
    """Row ``r`` begins ``(r // inner) * outer_stride + (r % inner) * inner_stride`` elements after the first."""

    total: int
    inner: int
    outer_stride: int
    inner_stride: int


def fold(x: Tensor, kept: int = 1, name: str = "x") -> Rows:
    """The leading dims of ``x`` as rows; the last ``kept`` dims are what a row holds.

    Raises:
        ValueError: the leading dims have strides that two do not express.
    """
    if x.dim() == kept + 1:
        rows = x.shape[0]
        return Rows(rows, rows, 0, x.stride(0))
    lead = x.dim() - kept
    if 0 in x.shape[:lead]:
        return Rows(0, 1, 0, 0)
    groups = _groups(x.shape[:lead], x.stride()[:lead])
    if len(groups) > 2:
        raise ValueError(unfolded(name, x, kept))
    (inner, inner_stride), (outer, outer_stride) = (*groups, (1, 0), (1, 0))[:2]
    return Rows(outer * inner, inner, outer_stride, inner_stride)


def unfolded(name: str, x: Tensor, kept: int = 1) -> str:
    """That the leading dims have strides that two do not express, as a text; empty where they fold."""
    lead = x.dim() - kept
    if lead < 3 or 0 in x.shape[:lead] or len(_groups(x.shape[:lead], x.stride()[:lead])) < 3:
        return ""
    return (
        f"{name} has shape {tuple(x.shape)} and strides {tuple(x.stride())}: its leading dims do not fold into two; "
        f"pass {name}.contiguous()"
    )


def _groups(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sizes and strides after joining neighbours that lie behind each other in memory, the innermost first."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, stride))
    return groups


def empty_like(x: Tensor, *others: object) -> Tensor:
    """An output like ``x``: its shape, dtype and device; contiguous. The further inputs of an op are ignored."""
    import torch

    return torch.empty_like(x, memory_format=torch.contiguous_format)


def no_outputs(request: object) -> Callable[..., None]:
    """For ops that only change their arguments: what makes no output of a call's arguments."""

    def nothing(*args: object, **kwargs: object) -> None:
        del args, kwargs

    return nothing


def half_of(x: Tensor) -> Tensor:
    """An empty output half as wide as ``x``, contiguous."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def refuse_grad() -> None:
    """For kernels without a backward, to call when an input requires a gradient: it would be lost without a word.

    Raises:
        RuntimeError: gradients are recorded.
    """
    import torch

    if torch.is_grad_enabled():
        raise RuntimeError(
            "an input requires a gradient, and this kernel has no backward: bind the op with needs_grad=True, or "
            "call it under torch.no_grad()"
        )
