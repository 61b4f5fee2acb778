"""Recognising arguments that look like the last checked ones: the price of a check on the hot path.

Reading shape, dtype, device and strides of three tensors from Python costs over a microsecond. torch's compiler guards
compare all of them, and requires_grad and dispatch keys too, in one C++ call (``TensorGuards``, torch 2.0 and newer; a
private name, so a plain comparison stands in where it is missing or has changed, and where one tensor stands in two
places, which the guard never recognises).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Known", "Same", "known_first", "learnt", "like", "never"]

Same = Callable[..., bool]
Known = tuple[Same, Callable[[Any, Any, Any], Any]]
"""What recognises three tensors, and what is called with them then. One tuple, since threads may share a handle."""
F = TypeVar("F", bound=Callable[..., Any])
_NOTHING: dict[str, Any] = {}


def known_first(call: F) -> F:
    """For the ``__call__`` of a handle: q, k, v alone, like those of its ``_known``, go straight to the kernel, and with
    a cache and a plan alone to ``_attend``, if ``_is_known`` says so.

    Ten keywords that are not given cost a third of a microsecond to fill in, so here they are one mapping.
    """

    @functools.wraps(call)
    def handle(self: Any, q: Any, k: Any = None, v: Any = None, **others: Any) -> Any:
        if not others:
            same, run = self._known
            if same(q, k, v):
                return run(q, k, v)
        elif len(others) == 2 and "cache" in others and "plan" in others:
            cache, plan = others["cache"], others["plan"]
            if self._is_known(q, k, v, cache, plan):
                return self._attend(q, k, v, cache, plan, _NOTHING)
        return call(self, q, k, v, **others)

    return cast("F", handle)


def never(*tensors: Any) -> bool:
    """Recognises nothing: every call is checked in full."""
    return False


def like(*tensors: Tensor) -> Same:
    """A function that tells whether as many tensors have the shapes, strides, dtypes and devices of these."""
    try:
        return guard(*tensors)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return compare(*tensors)


def learnt(*tensors: Tensor) -> bool:
    """Whether one requires a gradient: whether that is an error depends on the mode of each call."""
    return any(x.requires_grad for x in tensors)


def guard(*tensors: Tensor) -> Same:
    """By torch's own guard. Tensors are described, not kept alive."""
    import torch._C._dynamo.guards as guards

    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    make: Any = guards.TensorGuards
    check: Same = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if not check(*tensors):
        raise RuntimeError("TensorGuards does not recognise the tensors it was made of")
    return check


def compare(*tensors: Tensor) -> Same:
    """By comparing each property."""
    wanted = tuple(_properties(t) for t in tensors)

    def check(*others: Any) -> bool:
        try:
            return tuple(_properties(t) for t in others) == wanted
        except AttributeError:  # no tensor
            return False

    return check


def _properties(t: Tensor) -> tuple[Any, ...]:
    return (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
