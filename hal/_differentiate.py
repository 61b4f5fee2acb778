"""Gradients inside an op of the torch library, where autograd does not record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["gradients"]


def gradients(
    function: Callable[..., Any], args: Sequence[Any], places: Sequence[int], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*args)`` at the tensors in ``places``, contiguous, given those of its results.

    The function runs in a thread of its own: the dispatcher leaves autograd out below an op, thread by thread, and has
    no public way back. Device and stream are those of the caller. A result without a gradient of its own, and one whose
    ``grads`` is None, counts for nothing; an argument that no result depends on has zeros.
    """
    import torch

    outcome: list[Any] = []

    def work() -> None:
        given = list(args)
        try:
            with torch.enable_grad():
                for i in places:
                    given[i] = args[i].detach().requires_grad_()
                found = function(*given)
                results = found if isinstance(found, tuple) else (found,)
                pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
                outs, weights = [r for r, _ in pairs], [g for _, g in pairs]
                outcome.append(torch.autograd.grad(outs, [given[i] for i in places], weights, allow_unused=True))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            outcome.append(error)

    _run_beside(work, args[places[0]].device)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    made = zip(outcome[0], places, strict=True)
    return tuple(torch.zeros_like(args[i]) if g is None else g.contiguous() for g, i in made)


def _run_beside(work: Callable[[], None], device: torch.device) -> None:
    """Run in another thread on the current stream, and wait for it."""
    import torch

    if device.type == "cpu":
        target = work
    else:
        module = torch.get_device_module(device)
        stream = module.current_stream(device)

        def target() -> None:
            with module.device(device), module.stream(stream):
                work()

    thread = threading.Thread(target=target, name="hal backward")
    thread.start()
    thread.join()
