"""``RowCase``: inputs of an op over rows in the forms that callers pass, and the judgement of what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import torch_dtype
from hal_ops.case import Case
from hal_ops.compare import Comparison, compare

__all__ = ["FORMS", "RowCase", "draw", "variants", "views"]

FORMS = ("plain", "strided", "out", "inplace")
"""Contiguous inputs; slices of larger tensors, of three dims or more; ``out`` is a slice; ``out`` is an input."""

_PAD = 8
TOKENS = (3, 6)


@dataclasses.dataclass(frozen=True)
class RowCase(Case):
    """One call. ``factory`` is the op's reference, ``outputs`` makes empty outputs.

    ``names`` are those of the results, ``mutated`` those of the arguments that the op changes, by place; ``inplace``
    are the places of the arguments that ``out`` may be.
    """

    request: Any
    label: str
    args: tuple[Any, ...]
    factory: Callable[..., Any]
    outputs: Callable[..., Any]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ("out",)
    mutated: Mapping[int, str] = dataclasses.field(default_factory=dict)
    inplace: tuple[int, ...] = (0,)
    form: str = "plain"

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        return self._call(implementation)[0]

    def expected(self) -> dict[str, Tensor]:
        implementation = self.factory(self.request, "cpu", accumulate=torch.float64, rounded=False)
        args = tuple(_on_cpu(x) for x in self.args)
        kwargs = {name: _on_cpu(x) for name, x in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs, form="plain").call(implementation)

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        found, faults = self._call(implementation)
        right = self.expected()
        judged = [self.judge(name, found[name], right[name]) for name in found]
        return (*judged, *(Comparison(self.label, (fault,)) for fault in faults))

    def judge(self, name: str, found: Tensor, right: Tensor) -> Comparison:
        """One result against what is right, within a few steps of the format: sums are wider, and rounded once."""
        title, wanted = f"{self.label}: {name}", torch_dtype(self.request.dtype)
        if found.dtype != wanted:
            return Comparison(title, (f"its dtype is {found.dtype}; the contract says {wanted}",))
        return compare(found.unsqueeze(-2), right.unsqueeze(-2), dtype=self.request.dtype, name=title)

    def _call(self, implementation: Callable[..., Any]) -> tuple[dict[str, Tensor], list[str]]:
        changed = {*self.mutated, *(self.inplace if self.form == "inplace" else ())}
        args = [_again(x) if i in changed else x for i, x in enumerate(self.args)]
        given, frames = self._outs(args)
        kwargs = {**self.kwargs, **({} if given is None else {"out": given})}
        results = implementation(*args, **kwargs)
        found = dict(zip(self.names, results if isinstance(results, tuple) else (results,), strict=True))
        found |= {name: args[i] for i, name in self.mutated.items()}
        return found, [*_frame_faults(frames), *self._layout_faults(found, given)]

    def _outs(self, args: list[Any]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The ``out`` to give, and for each of its tensors the memory around it."""
        if self.form == "inplace":
            outs = [args[i] for i in self.inplace]
            frames = []
        elif self.form == "out":
            made = self.outputs(*args, **self.kwargs)
            frames = [_framed(x) for x in (made if isinstance(made, tuple) else (made,))]
            outs = [view for view, _ in frames]
        else:
            return None, []
        return (tuple(outs) if len(self.names) > 1 else outs[0]), frames

    def _layout_faults(self, found: dict[str, Tensor], given: Any) -> list[str]:
        if given is None:
            return [f"{n} is not contiguous: {found[n].stride()}" for n in self.names if not found[n].is_contiguous()]
        outs = given if isinstance(given, tuple) else (given,)
        return [
            f"{n} is not the out that was given" for n, x in zip(self.names, outs, strict=True) if found[n] is not x
        ]


def variants(inplace: bool = True) -> Callable[..., tuple[Mapping[str, Any], ...]]:
    """Further keyword arguments of a ``make_case``: each form but the plain one."""
    forms = tuple({"form": form} for form in FORMS[1:] if inplace or form != "inplace")
    return lambda request, phase: forms


def draw(generator: torch.Generator, *shape: int, dtype: str, device: Any = "cpu") -> Tensor:
    """Normal values, a few of them thirty times larger."""
    x = torch.randn(*shape, generator=generator)
    outliers = torch.rand(*shape, generator=generator) < 0.003
    return torch.where(outliers, 30 * x, x).to(torch_dtype(dtype)).to(device)


def views(x: Tensor, form: str, kept: int = 1) -> Tensor:
    """``x`` ``[tokens, ...]`` as the form says: as it is, or ``[3, 6, ...]`` as a slice of a tensor that holds NaN."""
    if form != "strided":
        return x
    x = x.reshape(*TOKENS, *x.shape[1:])
    sizes = list(x.shape)
    sizes[1] += 1
    sizes[-1] += _PAD
    if kept == 2:
        sizes[-2] += 1
    view = x.new_full(sizes, torch.nan)[tuple(slice(0, n) for n in x.shape)]
    return view.copy_(x)


def _again(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _framed(x: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor shaped like ``x`` inside a larger one of NaN, and the larger one."""
    frame = torch.full((*x.shape[:-1], x.shape[-1] + _PAD), torch.nan, device=x.device).to(x.dtype)
    return frame[..., : x.shape[-1]], frame


def _frame_faults(frames: list[tuple[Tensor, Tensor]]) -> list[str]:
    around = (frame[..., view.shape[-1] :] for view, frame in frames)
    return ["it wrote beside the out that was given" for x in around if not bool(x.float().isnan().all())]


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x
