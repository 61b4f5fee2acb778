"""``silu_and_mul`` by torch: the formula once more in Python's floats, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import hal
from hal_ops.silu_and_mul import SiluAndMulRequest, reference, torch_gate

IMPLEMENTATIONS = {"reference": reference.silu_and_mul, "torch": torch_gate.silu_and_mul}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_formula(name: str) -> None:
    request = SiluAndMulRequest(hidden_size=5, dtype="float32")
    x = 4 * torch.randn(3, 10)
    found = IMPLEMENTATIONS[name](request, "cpu")(x)
    for row, mine in zip(x.tolist(), found.tolist(), strict=True):
        wanted = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(row[:5], row[5:], strict=True)]
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_gates_of_either_sign(name: str) -> None:
    """The gate closes to 0 and opens to the identity without an infinity on the way."""
    request = SiluAndMulRequest(hidden_size=4, dtype="float32")
    x = torch.tensor([[-1e4, 1e4, -200.0, 0.0, 2.0, 2.0, 2.0, 2.0]])
    assert IMPLEMENTATIONS[name](request, "cpu")(x).tolist() == [[0.0, 2e4, 0.0, 0.0]]


def test_the_input_must_be_twice_as_wide() -> None:
    gate = hal.get_op("silu_and_mul", hidden_size=4, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"should be float32 \[..., 8\]"):
        gate(torch.randn(2, 4))


def test_the_input_is_not_changed_and_gradients_flow() -> None:
    request = SiluAndMulRequest(hidden_size=6, dtype="float32", needs_grad=True)
    x = torch.randn(3, 12, dtype=torch.float32, requires_grad=True)
    before = x.detach().clone()
    torch_gate.silu_and_mul(request, "cpu")(x).sin().sum().backward()
    again = before.double().requires_grad_()
    (torch.nn.functional.silu(again[:, :6]) * again[:, 6:]).sin().sum().backward()
    assert torch.equal(x.detach(), before)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), again.grad, atol=1e-5, rtol=1e-5)
