"""``Case``: one set of inputs of an op, what is right for it, and the judgement of an implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hal_ops.compare import Comparison

__all__ = ["Case"]


class Case(ABC):
    """Inputs made by an op's ``cases`` target. Unused slots hold poison, so reading one shows.

    ``label`` says in words what the case is. Inputs are the same on every device for one seed.
    """

    label: str

    @abstractmethod
    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """Calls what a kernel's factory returned as the contract says, and names what comes back."""

    @abstractmethod
    def expected(self) -> Mapping[str, Tensor]:
        """What is right, in float64."""

    @abstractmethod
    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """Calls the implementation and judges each of its outputs."""

    def flop(self) -> float | None:
        """Operations of the call, two a multiplication with its sum; None where nobody counts them."""
        return None

    def num_bytes(self) -> float | None:
        """Bytes that the call must read and write; None where nobody counts them."""
        return None

    def size(self) -> str:
        """How much it is, in words."""
        return self.label
