"""``gelu_and_mul`` by torch: both formulas once more in Python's floats, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from hal_ops.gelu_and_mul import GeluAndMulRequest, reference, torch_gate

IMPLEMENTATIONS = {"reference": reference.gelu_and_mul, "torch": torch_gate.gelu_and_mul}
FORMULAS: dict[str, Callable[[float], float]] = {
    "none": lambda z: z / 2 * (1 + math.erf(z / math.sqrt(2))),
    "tanh": lambda z: z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("approximate", FORMULAS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_formula(name: str, approximate: str) -> None:
    request = GeluAndMulRequest(hidden_size=64, dtype="float64", approximate=approximate)
    x = 2 * torch.randn(3, 128, dtype=torch.float64)
    found = IMPLEMENTATIONS[name](request, "cpu")(x)
    for row, mine in zip(x.tolist(), found.tolist(), strict=True):
        wanted = [FORMULAS[approximate](gate) * up for gate, up in zip(row[:64], row[64:], strict=True)]
        assert mine == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_formulas_differ_by_more_than_the_comparison_allows() -> None:
    z = torch.linspace(-3, 3, 64, dtype=torch.float64)
    x = torch.cat((z, torch.ones_like(z)))
    found = [
        torch_gate.gelu_and_mul(GeluAndMulRequest(hidden_size=64, dtype="float64", approximate=a), "cpu")(x)
        for a in FORMULAS
    ]
    assert 1e-4 < float((found[0] - found[1]).abs().max()) < 1e-3


def test_erf_is_another_word_for_none() -> None:
    assert GeluAndMulRequest(hidden_size=4, approximate="erf").approximate == "none"
    with pytest.raises(ValueError, match="approximate='quick': choose 'none' or 'tanh'"):
        GeluAndMulRequest(hidden_size=4, approximate="quick")
