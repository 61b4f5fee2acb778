"""Whether a kernel's output is right: three gates, none of which can hide a wrong head, row or NaN.

1. **Anomalies**: NaN and the infinities are where they should be, and nowhere else.
2. **Largest and mean error**, measured against what plain torch makes of the same formula in the same format: the
   largest at most twice torch's own, the mean at most one and a half times, plus the rounding of numbers near 0.3.
   The rule follows the inputs, so it needs no tolerance table; flash-attention's tests use such a one.
3. **Relative error of each block** of a few rows of one head, as a quotient of Frobenius norms, so that one wrong row
   cannot drown in many right ones, nor small values beside large ones.

Expected values are best given in float64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Comparison", "compare", "compare_lse"]

_ROWS = 8
_BLOCK_ERROR = {"float64": 1e-12, "float32": 1e-5, "float16": 4 * 2**-12, "bfloat16": 4 * 2**-9}
_FP8_BLOCK_ERROR = 0.08
_FP8_SLACK = 2.0
_WORST_BLOCK_ERROR = 0.25
_CANCELLED = 1e3
"""Where plain torch is off by so many times a block's norm, the block holds what cancelled, and no value."""
_WIDE = ("float64", "float32")
"""Formats in which torch's own error may happen to be next to none, so that a multiple of it says nothing."""
_LSE_ERROR = {"float64": 1e-6, "float32": 1e-5, "float16": 1e-3, "bfloat16": 2.5e-3}
"""Some kernels sum the probabilities as they multiply them, rounded to the format: half of its step is 2**-9."""
_FP8_LSE_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison. ``failures`` is empty when all gates are passed.

    ``max_error``, ``mean_error`` and ``block_error`` (the worst block's) are of the finite elements.
    """

    name: str
    failures: tuple[str, ...]
    max_error: float = 0.0
    mean_error: float = 0.0
    block_error: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every gate is passed."""
        return not self.failures

    def report(self) -> str:
        """What failed and where, a line each; or the errors found."""
        found = f"max error {self.max_error:.3g}, mean {self.mean_error:.3g}, worst block {self.block_error:.3g}"
        if self.ok:
            return f"{self.name}: right; {found}"
        return "\n".join([f"{self.name}: WRONG; {found}", *(f"  - {text}" for text in self.failures)])

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.report()


def compare(
    actual: Tensor,
    expected: Tensor,
    low_precision: Tensor | None = None,
    *,
    dtype: str,
    name: str = "out",
    slack: float = 1.0,
) -> Comparison:
    """Compare ``[..., heads, dim]`` outputs by the three gates.

    Args:
        actual: what the kernel returned; expected: what is right, in float32 or float64.
        low_precision: plain torch's result in ``dtype``; without it a fixed multiple of the format's step stands in.
        dtype: the format that the kernel computes in (for an FP8 cache that format: its bounds are wider).
        slack: multiplies the bounds of the second gate and, in those of the third, plain torch's share and what FP8 is
            allowed (for formulas that kernels approximate, such as tanh, and for rounding that falls out otherwise than
            plain torch's).
    """
    fault = _shape_fault(actual, expected)
    if fault:
        return Comparison(name, (fault,))
    odd = _anomalies(actual, expected)
    actual = actual.to(expected.device)
    finite = expected.isfinite() & actual.isfinite()
    want = torch.where(finite, expected, 0.0).double()
    got = torch.where(finite, actual, 0.0).double()
    low = None
    if low_precision is not None:  # where plain torch overflows, its error is no measure
        plain = low_precision.to(expected.device)
        low = torch.where(finite & plain.isfinite(), plain.double(), want)
    error = (got - want).abs()
    sizes = _size_failures(error, got, want, low, dtype, slack)
    blocks = _block_failures(error, got, want, low, dtype, slack)
    return Comparison(name, (*odd, *sizes, *blocks), _top(error), _mean(error), _top(_quotients(error, want)))


def compare_lse(actual: Tensor, expected: Tensor, *, dtype: str, name: str = "lse", slack: float = 1.0) -> Comparison:
    """Compare ``[..., heads]`` logsumexps: each within ``atol + rtol * |expected|``, infinities in the same places.

    ``slack`` multiplies the bounds, for kernels that may round their inputs.

    Raises:
        ValueError: ``actual`` is neither float32 nor float64; the contract says float32.
    """
    fault = _shape_fault(actual, expected)
    if not fault and actual.dtype not in (torch.float32, torch.float64):
        fault = f"its dtype is {actual.dtype}; the contract says float32"
    if fault:
        return Comparison(name, (fault,))
    failures = _anomalies(actual, expected)
    actual = actual.to(expected.device)
    finite = expected.isfinite() & actual.isfinite()
    want = torch.where(finite, expected, 0.0).double()
    got = torch.where(finite, actual, 0.0).double()
    error = (got - want).abs()
    step = _LSE_ERROR.get(dtype, _FP8_LSE_ERROR)
    bound = slack * (step + step * want.abs())
    if bool((error > bound).any()):
        failures.append(_worst("natural log of the denominator", error, bound, got, want))
    return Comparison(name, tuple(failures), _top(error), _mean(error))


def _shape_fault(actual: Tensor, expected: Tensor) -> str:
    if actual.shape == expected.shape:
        return ""
    return f"its shape is {tuple(actual.shape)}; the contract says {tuple(expected.shape)}"


def _anomalies(actual: Tensor, expected: Tensor) -> list[str]:
    failures = []
    actual = actual.to(expected.device)
    for word, found, wanted in (
        ("NaN", actual.isnan(), expected.isnan()),
        ("+inf", actual == torch.inf, expected == torch.inf),
        ("-inf", actual == -torch.inf, expected == -torch.inf),
    ):
        wrong = found != wanted
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            share = wrong.double().mean().item()
            failures.append(
                f"{word} in the wrong places: {share:.1%} of the elements, first at {at}: "
                f"found {actual[at].item():g}, expected {expected[at].item():g}"
            )
    return failures


def _size_failures(error: Tensor, got: Tensor, want: Tensor, low: Tensor | None, dtype: str, slack: float) -> list[str]:
    if not error.numel():
        return []
    slack *= 1.0 if dtype in _BLOCK_ERROR else _FP8_SLACK
    own = torch.zeros_like(error) if low is None else (low - want).abs()
    floor = _BLOCK_ERROR.get(dtype, _FP8_BLOCK_ERROR) * _top(want.abs()) if low is None or dtype in _WIDE else 0.0
    most = slack * max(2 * _top(own), floor) + _rounding(want, dtype)
    mean = slack * max(1.5 * _mean(own), floor) + _rounding(want, dtype)
    failures = []
    if _top(error) > most:
        failures.append(_worst("largest error", error, torch.full_like(error, most), got, want))
    if _mean(error) > mean:
        failures.append(f"mean error {_mean(error):.3g}; the bound is {mean:.3g}")
    return failures


def _block_failures(
    error: Tensor, got: Tensor, want: Tensor, low: Tensor | None, dtype: str, slack: float
) -> list[str]:
    quotients = _quotients(error, want)
    if not quotients.numel():
        return []
    bound = torch.full_like(quotients, _BLOCK_ERROR.get(dtype, slack * _FP8_BLOCK_ERROR))
    if low is not None:
        own = 2 * slack * _quotients((low - want).abs(), want)
        bound = torch.maximum(bound, own.clamp_max(_WORST_BLOCK_ERROR))
        # gradients may cancel, in float64 to a remnant: no quotient says how little is little
        nothing = (_block_sums(want.square()) == 0) | (own > _CANCELLED)
        bound = torch.where(nothing, own.where(nothing, 0.0).amax(), bound)
    wrong = quotients > bound
    if not bool(wrong.any()):
        return []
    block, head = divmod(int((quotients / bound).argmax()), quotients.shape[1])
    inside = error.reshape(-1, *error.shape[-2:])[block * _ROWS : (block + 1) * _ROWS, head]
    row, column = divmod(int(inside.argmax()), inside.shape[1])
    at = (block * _ROWS + row, head, column)
    found, right = (x.reshape(-1, *x.shape[-2:])[at].item() for x in (got, want))
    text = (
        f"relative error of {wrong.double().mean().item():.1%} of the blocks; worst: rows {block * _ROWS} to "
        f"{block * _ROWS + inside.shape[0] - 1} of head {head}, {quotients[block, head].item():.3g}, the bound is "
        f"{bound[block, head].item():.3g}; there at row {at[0]}, element {column}: found {found:g}, expected {right:g}"
    )
    return [text]


def _quotients(error: Tensor, want: Tensor) -> Tensor:
    """Frobenius norm of the error over that of what is right, ``[row blocks, heads]``."""
    top, bottom = (_block_sums(x.square()) for x in (error, want))
    return (top / bottom.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _block_sums(x: Tensor) -> Tensor:
    rows = x.reshape(-1, *x.shape[-2:]).sum(-1)
    rows = functional.pad(rows, (0, 0, 0, -rows.shape[0] % _ROWS))
    return rows.view(-1, _ROWS, rows.shape[1]).sum(1)


def _worst(what: str, error: Tensor, bound: Tensor, got: Tensor, want: Tensor) -> str:
    at = tuple(int(i) for i in torch.unravel_index((error / bound).argmax(), error.shape))
    share = (error > bound).double().mean().item()
    return (
        f"{what}: {share:.1%} of the elements beyond the bound, the worst at {at}: found {got[at].item():g}, "
        f"expected {want[at].item():g}, off by {error[at].item():.3g}, the bound is {bound[at].item():.3g}"
    )


def _rounding(want: Tensor, dtype: str) -> float:
    """Twice the error of adding 0.3 to each value and taking it off again, in ``dtype``."""
    x = want.to(getattr(torch, dtype if dtype in _BLOCK_ERROR else "bfloat16"))
    return 2 * _top(((x + 0.3 - 0.3) - x).abs())


def _top(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _mean(x: Tensor) -> float:
    return x.mean().item() if x.numel() else 0.0
