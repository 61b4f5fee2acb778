"""The checks before each call of an op's kernel, whose ever that is: its arguments, and that no gradient is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hal import _settings
from hal._same import like, never
from hal._selection import Selection
from hal.errors import InputError
from hal_ops import resolve_target

__all__ = ["checked", "keeps_gradients"]


def checked(selection: Selection, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with the checks of its op (:attr:`hal_ops.Op.check`), or as it is where the op has none.

    An accelerator's tensors that look like the last ones are not checked again, unless values are: a guard of torch's
    compares them in a fraction of the time (:mod:`hal._same`). On the host some ops read numbers, which differ. Compilers
    trace the check itself, which is gone from what they make.
    """
    import torch

    op = selection.op
    if op.check is None:
        return fn
    values = bool(_settings.current()["debug_checks"])
    problem = resolve_target(op.check)(selection.request, selection.device.torch_device(), values)

    compiling, last = torch.compiler.is_compiling, [never]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and not compiling() and last[0](*args):
            return fn(*args)
        wrong = problem(*args, **kwargs)
        if wrong:
            raise InputError(f"{op.name}: {wrong}")
        if not (kwargs or values or compiling()) and all(isinstance(x, torch.Tensor) and not x.is_cpu for x in args):
            last[0] = like(*args)
        return fn(*args, **kwargs)

    return call


def keeps_gradients(selection: Selection, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, which without ``needs_grad`` in the request refuses what requires a gradient.

    It stands outside of traced nodes, since compilers take apart what requires gradients before they call one.
    """
    import torch

    request = selection.request
    if getattr(request, "needs_grad", False):
        return fn
    known = "needs_grad" in request.rules()
    remedy = "ask for needs_grad=True" if known else "it is not differentiable, so detach what it is given"

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in (*args, *kwargs.values()):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    raise InputError(
                        f"{selection.op.name}: an input requires a gradient, which the request does not speak of: {remedy}, "
                        "or call under torch.no_grad()"
                    )
        return fn(*args, **kwargs)

    return call
