"""Gradients: those of a kernel against autograd of the reference."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.testing._watched import blamed
from hal_ops import Op, resolve_target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["gradient_problems"]

_FIXED = ("alibi_slopes",)


def gradient_problems(case: Any, implementation: Callable[..., Any], op: Op, phase: str) -> list[str]:
    """What is wrong with the gradients of a case's floating-point inputs; empty when they are right.

    The loss is a random projection of the outputs; an ``lse`` takes part where the kernel makes it differentiable.

    Raises:
        KernelError: the kernel's outputs cannot be differentiated.
        TypeError: the op's cases do not hold their inputs in ``args``, so that none can be replaced.
    """
    import torch

    from hal_ops.compare import compare

    if not hasattr(case, "args"):
        raise TypeError(f"cases of op {op.name!r} must be dataclasses with 'args' for needs_grad to be checked")
    request = case.request
    found, used = blamed(_gradients, case, implementation, None)
    factory = resolve_target(op.reference[phase])
    right, _ = _gradients(case, _oracle(factory, request, torch.float64), torch.float64, used)
    low = None
    if "accumulate" in inspect.signature(factory).parameters:
        low, _ = _gradients(case, _oracle(factory, request, getattr(torch, request.dtype)), torch.float64, used)
    problems = []
    for name, gradient in found.items():
        if gradient is None:
            problems.append(f"{case.label}: no gradient reaches {name}")
            continue
        plain = None if low is None else _shaped(low[name])
        title = f"{case.label}: gradient of {name}"
        result = compare(_shaped(gradient), _shaped(right[name]), plain, dtype=request.dtype, name=title, slack=2.0)
        problems += [] if result.ok else [result.report()]
    return problems


def _oracle(factory: Callable[..., Any], request: Any, accumulate: torch.dtype) -> Callable[..., Any]:
    takes = inspect.signature(factory).parameters
    wanted = {"accumulate": accumulate, "rounded": False}
    made: Callable[..., Any] = factory(request, "cpu", **{k: v for k, v in wanted.items() if k in takes})
    return made


def _gradients(
    case: Any, implementation: Callable[..., Any], dtype: torch.dtype | None, outputs: tuple[str, ...] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Gradient by input's name, and the outputs that took part. With ``dtype`` the inputs are such, on the CPU."""
    import torch

    args = tuple(_leaf(x, dtype) for x in case.args)
    kwargs = {n: x if n in _FIXED else _leaf(x, dtype) for n, x in case.kwargs.items()}
    if dtype is not None:
        kwargs = {n: x.cpu() if isinstance(x, torch.Tensor) and not x.requires_grad else x for n, x in kwargs.items()}
    results = dataclasses.replace(case, args=args, kwargs=kwargs).call(implementation)
    used = outputs or tuple(n for n, x in results.items() if n == "out" or x.requires_grad)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for name in used:
        weights = torch.randn(results[name].shape, generator=draw, dtype=torch.float32).to(results[name].device)
        finite = results[name].isfinite()
        losses.append((results[name].where(finite, 0.0) * weights.to(results[name].dtype)).sum())
    torch.stack([loss.double() for loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    named = {f"args[{i}]": x for i, x in enumerate(args)} | kwargs
    return {n: x.grad for n, x in named.items() if isinstance(x, torch.Tensor) and x.requires_grad}, used


def _leaf(x: Any, dtype: torch.dtype | None) -> Any:
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    if not x.is_floating_point():
        return x if dtype is None else x.cpu()
    copy = x.detach() if dtype is None else x.detach().cpu().to(dtype)
    return copy.requires_grad_()


def _shaped(gradient: Tensor) -> Tensor:
    """As ``[rows, heads, dim]``: a matrix has rows of one head, a vector is one row."""
    gradient = gradient.detach()
    return gradient if gradient.dim() >= 3 else gradient.reshape(-1, 1, gradient.shape[-1])
