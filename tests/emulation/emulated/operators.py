"""torch's own operators, answered on the CPU by an emulation, through torch's dispatcher and autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["emulated_operators", "spied"]


@contextlib.contextmanager
def emulated_operators(emulations: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Kernels for CPU tensors of ``aten`` operators that have none: ``{"_flash_attention_forward": function}``."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, function in emulations.items():
            library.impl(name, function, "CPU")
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def spied(module: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Records the calls of a function that ``module`` holds under ``name``: (args, kwargs) each."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    function = getattr(module, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    setattr(module, name, spy)
    try:
        yield calls
    finally:
        setattr(module, name, function)
