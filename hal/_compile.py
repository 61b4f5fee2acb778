"""Kernels as nodes of a traced graph: what ``torch.compile(fullgraph=True)`` meets is one op, never a kernel's inside.

A bound kernel becomes an op of the torch library ``hal``, named after the decision, so that equal decisions have equal
names in every process. ``Library.define`` and ``impl`` are used, which cost a third of ``custom_op`` a call
(pytorch/pytorch#177109).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal._selection import Selection
from hal.errors import InputError
from hal_ops import resolve_target

if TYPE_CHECKING:
    import torch

__all__ = ["node", "traceable"]

_functions: dict[str, Callable[..., Any]] = {}
"""The function behind each op that is defined. Ops cannot be defined anew, functions can be exchanged."""


def traceable(selection: Selection, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what the bound ``fn`` does, and that compilers trace as one node.

    Raises:
        InputError: the op's contract does not say how it is traced, or asks for gradients of an op that works in place.
    """
    op, request = selection.op, selection.request
    if op.traced is None:
        raise InputError(f"op {op.name!r} cannot be traced: its contract gives no schema; leave out compile=True")
    gradients = getattr(request, "needs_grad", False)
    if gradients and "!" in op.traced.arguments:
        raise InputError(
            f"op {op.name!r} changes an argument in place, and a traced node that does has no gradient: leave out "
            "compile=True (torch.compile traces torch's own kernels as they are), or needs_grad=True"
        )
    name, outputs = _name(selection), resolve_target(op.traced.outputs)(request)
    returns = "Tensor" if op.traced.results == 1 else f"({', '.join(['Tensor'] * op.traced.results)})"
    backward = (_keep, _backward(name)) if gradients else None
    fresh = node(name, op.traced.arguments, returns, fn, outputs, backward=backward)
    if not op.traced.results or not op.traced.takes_out:
        return fresh
    outs = [f"out{i}" for i in range(op.traced.results)]
    changed = ", ".join(f"Tensor({'xyz'[i]}!) {out}" for i, out in enumerate(outs))
    arguments = op.traced.arguments if "*" in op.traced.arguments else f"{op.traced.arguments}, *"
    into = node(f"{name}_out", f"{arguments}, {changed}", "()", _filling(fn, outs), _nothing)
    return _front(fresh, into, outs)


def node(
    name: str,
    arguments: str,
    returns: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> torch._ops.OpOverload:
    """The op ``hal::name`` for ``function``, on every device.

    Args:
        arguments, returns: in torch's schema language; changed arguments are marked. Results may not share memory with
            arguments.
        fake: makes empty results from the arguments.
        backward: ``setup_context`` and ``backward`` of its gradients, as ``torch.library.register_autograd`` takes
            them.
    """
    import torch

    known = name in _functions
    _functions[name] = function
    if not known:
        library = _library()
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        library.define(f"{name}({arguments}) -> {returns}", tags=tags)  # type: ignore[no-untyped-call]
        library.impl(  # type: ignore[no-untyped-call]
            name, lambda *args, **kwargs: _functions[name](*args, **kwargs), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"hal::{name}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(f"hal::{name}", backward[1], setup_context=backward[0], lib=library)
    found: torch._ops.OpOverload = getattr(torch.ops.hal, name).default
    return found


@functools.cache
def _library() -> torch.library.Library:
    import torch

    return torch.library.Library("hal", "FRAGMENT")  # type: ignore[no-untyped-call]


def _name(selection: Selection) -> str:
    """A name that says op and kernel, and differs where the decision does."""
    kernel = str(selection.kernels()["call"]).replace(".", "_")
    facts = (selection.request.digest(), kernel, selection.device.torch_type, str(selection.device.arch))
    return f"{kernel}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _filling(fn: Callable[..., Any], outs: list[str]) -> Callable[..., None]:
    """``fn`` with its ``out`` as keywords of one tensor each."""

    def fill(*args: Any, **kwargs: Any) -> None:
        given = tuple(kwargs.pop(name) for name in outs)
        fn(*args, **kwargs, out=given[0] if len(given) == 1 else given)

    return fill


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Fills what it is given, so there is nothing to make from ``args`` and ``kwargs``."""
    del args, kwargs


def _front(fresh: Any, into: Any, outs: list[str]) -> Callable[..., Any]:
    """The call that the caller gets: the contract's, with ``out`` or without."""

    def call(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        if out is None:
            return fresh(*args, **kwargs)
        given = out if isinstance(out, tuple) else (out,)
        into(*args, **kwargs, **dict(zip(outs, given, strict=True)))
        return out

    return call


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs; the ``output`` is made anew in the backward."""
    import torch

    del output
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _backward(name: str) -> Callable[..., Any]:
    """The gradients are those of the function, which runs once more."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        import torch

        args = list(ctx.others)
        with torch.enable_grad():
            for place, x in zip(ctx.places, ctx.saved_tensors, strict=True):
                args[place] = x.detach().requires_grad_(ctx.needs_input_grad[place])
            results = _functions[name](*args)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
        wanted = [i for i in ctx.places if ctx.needs_input_grad[i]]
        outs, weights = [r for r, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(outs, [args[i] for i in wanted], weights, allow_unused=True)
        by_place = dict(zip(wanted, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(args)))

    return backward
