"""The cases of one check: what the op's own generator makes, and the forms that callers really pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hal_ops import Op, Request, resolve_target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Planned", "make_cases", "make_gradient_cases", "make_timing_case", "tensors_of"]


def make_cases(op: Op, request: Request, phase: str, device: torch.device, seed: int) -> Iterator[Any]:
    """Cases of one request, each an object like ``hal_ops``'s ``Case``.

    The first is the op's own. For attention there follow: large logits, dense or interleaved in memory; and values with
    outliers in strided views (slices of a fused projection), under bounds that are larger than need be; and, where the
    LSE may be asked for, a call that does not ask. An op of a plugin may have more too: a function
    ``make_case.variants(request, phase)`` that gives further keyword arguments.

    Raises:
        ValueError: the op has no cases.
    """
    if op.cases is None:
        raise ValueError(f"op {op.name!r} has no cases target: its kernels cannot be checked")
    make = resolve_target(op.cases)
    yield make(request, phase, device=device, seed=seed)
    if op.name == "attention":
        yield from _attention(make, request, phase, device, seed)
    for keywords in getattr(make, "variants", _none)(request, phase):
        yield make(request, phase, device=device, seed=seed, **keywords)


def make_gradient_cases(op: Op, request: Request, phase: str, device: torch.device, seed: int) -> Iterator[Any]:
    """Cases for gradients: well-scaled values only, since those of saturated rows are differences of near equals."""
    assert op.cases is not None
    make = resolve_target(op.cases)
    yield make(request, phase, device=device, seed=seed)
    if op.name == "attention" and phase == "prefill":
        yield make(request, phase, device=device, seed=seed, form="dense")


class Planned:
    """An implementation whose plan is made once: planning is a step's work, the call a layer's, and no graph may hold
    the copies from the host that a plan takes."""

    def __init__(self, implementation: Callable[..., Any]) -> None:
        self._implementation = implementation
        self._payload: Any = None
        self._made = False

    def plan(self, step: Any) -> Any:
        if not self._made:
            self._payload = self._implementation.plan(step)  # type: ignore[attr-defined]
            self._made = True
        return self._payload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._implementation(*args, **kwargs)


def make_timing_case(op: Op, request: Request, phase: str, device: torch.device) -> Any:
    """One case of a size that engines run: a few long prompts, a batch of decodes; smaller on the CPU."""
    assert op.cases is not None
    make = resolve_target(op.cases)
    if op.name not in ("attention", "mla_attention"):
        return make(request, phase, device=device)
    size = 1 if device.type == "cpu" else 8
    queries = getattr(request, "max_q_len", 1)
    lengths = {
        "prefill": [(128 * size, 128 * size)] * 2,
        "extend": [(64 * size, 256 * size)] * 2,
        "decode": [(queries, 256 * size)] * 4 * size,
    }
    return make(request, phase, device=device, lengths=lengths[phase])


def _none(request: Request, phase: str) -> tuple[Mapping[str, Any], ...]:
    return ()


def _attention(make: Callable[..., Any], request: Any, phase: str, device: Any, seed: int) -> Iterator[Any]:
    halves = phase != "prefill" and request.head_dim == request.v_head_dim
    form: dict[str, Any] = {"form": "dense"} if phase == "prefill" else {"interleaved": halves}
    yield make(request, phase, device=device, seed=seed + 1, scale="large", **form)
    case = make(request, phase, device=device, seed=seed + 2, scale="outliers")
    if phase == "prefill":
        args = tuple(map(_strided, case.args))
        longer = {n: 2 * v for n, v in case.kwargs.items() if n.startswith("max_seqlen")}
        kwargs = {**case.kwargs, **longer}
    else:
        step = case.args[3]
        bound = step.block_table.shape[1] * step.page_size
        args = (_strided(case.args[0]), *case.args[1:3], dataclasses.replace(step, max_kv_len=bound), *case.args[4:])
        kwargs = case.kwargs
    yield dataclasses.replace(case, args=args, kwargs=kwargs, label=f"{case.label}, strided views, loose bounds")
    if request.return_lse:
        plain = {"request": request.replace(return_lse=False), "kwargs": {**case.kwargs, "return_lse": False}}
        yield dataclasses.replace(case, **plain, label=f"{case.label}, called without return_lse")


def _strided(x: Tensor) -> Tensor:
    """The same values as a slice of a tensor with one more head, which holds NaN."""
    fused = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), float("nan"))
    view = fused[..., : x.shape[-2], :]
    view.copy_(x)
    return view


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a case, with its place in words."""
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, Request)):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from tensors_of(parts, path)
