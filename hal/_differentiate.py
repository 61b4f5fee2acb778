"""Gradients inside an op of the torch library, where autograd does not record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["can_record", "gradients"]


def gradients(
    function: Callable[..., Any], args: Sequence[Any], places: Sequence[int], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*args)`` at the tensors in ``places``, contiguous, given those of its results.

    A result without a gradient of its own, and one whose ``grads`` is None, counts for nothing; an argument that no
    result depends on has zeros. It runs in the caller's thread, which may be one of the autograd engine's.
    """
    import torch

    given = list(args)
    with _recording():
        for i in places:
            given[i] = args[i].detach().requires_grad_()
        found = function(*given)
        results = found if isinstance(found, tuple) else (found,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        outs, weights = [r for r, _ in pairs], [g for _, g in pairs]
        made = torch.autograd.grad(outs, [given[i] for i in places], weights, allow_unused=True)
    return tuple(torch.zeros_like(args[i]) if g is None else g.contiguous() for g, i in zip(made, places, strict=True))


def can_record() -> bool:
    """Whether this torch lets autograd record inside an op: that takes functions which are not public (seen in 2.13)."""
    import torch

    names = ("_dispatch_tls_set_dispatch_key_excluded", "_dispatch_tls_is_dispatch_key_excluded")
    return all(hasattr(torch._C, name) for name in names)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd records, also below an op, where the dispatcher leaves it out."""
    import torch

    keys = [key for name, key in torch._C.DispatchKey.__members__.items() if _records(name)]
    left_out = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in left_out:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in left_out:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _records(name: str) -> bool:
    """Keys of one device's autograd and of its bookkeeping; ``Autograd`` alone, and others, stand for many at once."""
    aliases = ("Autograd", "AutogradFunctionality", "AutogradNestedTensor")
    return name == "ADInplaceOrView" or (name.startswith("Autograd") and name not in aliases)
