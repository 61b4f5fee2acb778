"""Scalings of rotary frequencies for contexts longer than the one trained on. Data; needs no torch.

The angle of pair ``i`` at position ``p`` is ``p * f[i]`` with ``f[i] = base ** (-2 * i / rotary_dim)``. A scaling gives
other frequencies, and YaRN also a factor on the tables (so that it reaches the attention's logits squared).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from hal_ops._record import record

__all__ = ["LinearScaling", "Llama3Scaling", "Scaling", "YarnScaling"]


class Scaling(ABC):
    """Frequencies in place of the plain ones."""

    factor: float

    @abstractmethod
    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies, in radians a position, one a pair."""

    def table_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@record(frozen=True)
class LinearScaling(Scaling):
    """Positions divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        return [f / self.factor for f in frequencies]


@record(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1's: slow frequencies divided by ``factor``, fast ones kept, those between interpolated.

    A frequency is fast that turns ``high_freq_factor`` times or more in ``original_max_position`` positions, and slow
    that turns ``low_freq_factor`` times or fewer (llama-models, ``models/llama3/model.py``, ``apply_scaling``).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        span = self.high_freq_factor - self.low_freq_factor
        turns = [f * self.original_max_position / (2 * math.pi) for f in frequencies]
        kept = [min(max((t - self.low_freq_factor) / span, 0.0), 1.0) for t in turns]
        return [f * k + f / self.factor * (1 - k) for f, k in zip(frequencies, kept, strict=True)]


@record(frozen=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): as Llama's, with the ramp over the pairs' numbers, and a table factor.

    Fields, named as in transformers' ``rope_scaling``:
        factor: how much longer the context is than ``original_max_position``.
        beta_fast, beta_slow: turns within the original context, from which on a pair is kept, and up to which it is
            divided by ``factor``. truncate: whether the ramp's ends are rounded outwards to whole pairs.
        attention_factor: the table factor; default ``0.1 * ln(factor) + 1``, or what mscale and mscale_all_dim
            (DeepSeek's) make: ``(0.1 * mscale * ln(factor) + 1) / (0.1 * mscale_all_dim * ln(factor) + 1)``.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        low, high = self._ramp(2 * len(frequencies), base)
        divided = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(frequencies))]
        return [f / self.factor * d + f * (1 - d) for f, d in zip(frequencies, divided, strict=True)]

    def _ramp(self, dim: int, base: float) -> tuple[float, float]:
        """Numbers of the pairs between which the division sets in."""
        low, high = (
            dim * math.log(self.original_max_position / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high

    def table_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
