"""How torch's operators skip: an entry that is skipped repeats one that is not, so that nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["repeating"]


def repeating(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """For entries of which the negative ones are skipped, those to take in their places, and whether any is not skipped.

    Args:
        numbers: int32 or int64 ``[entries]``, at least one.

    Returns:
        int64 ``[entries]``, where each entry that is not skipped stands at its own place; and a bool of no dims.
    """
    largest, place = numbers.max(0)
    own = torch.arange(numbers.shape[0], device=numbers.device)
    return torch.where(numbers < 0, place, own), largest >= 0
