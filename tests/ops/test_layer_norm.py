"""``layer_norm`` by torch: the formula once more in Python's floats, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import hal
from hal_ops.layer_norm import LayerNormRequest, reference, torch_norm

IMPLEMENTATIONS = {"reference": reference.layer_norm, "torch": torch_norm.layer_norm}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_formula(name: str, weight: bool, bias: bool) -> None:
    request = LayerNormRequest(hidden_size=9, dtype="float32", weight=weight, bias=bias, eps=1e-3)
    x, affine = torch.randn(4, 9), [torch.randn(9) for _ in range(weight + bias)]
    found = IMPLEMENTATIONS[name](request, "cpu")(x, *affine)
    scale, shift = [*affine, torch.ones(9)][0].tolist(), affine[1].tolist() if bias else [0.0] * 9
    for row, mine in zip(x.tolist(), found.tolist(), strict=True):
        mean = sum(row) / 9
        root = math.sqrt(sum((v - mean) ** 2 for v in row) / 9 + 1e-3)
        wanted = [(v - mean) / root * a + b for v, a, b in zip(row, scale, shift, strict=True)]
        assert mine == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_mean_far_above_the_deviation(name: str) -> None:
    x = 1000 + torch.randn(8, 512)
    found = IMPLEMENTATIONS[name](LayerNormRequest(hidden_size=512, dtype="float32", weight=False, bias=False), "cpu")(
        x
    )
    exact = torch.nn.functional.layer_norm(x.double(), (512,))
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=0)


def test_weights_in_float32_beside_halves() -> None:
    request = LayerNormRequest(hidden_size=64, dtype="bfloat16", weight_dtype="float32")
    x, weight, bias = torch.randn(5, 64).bfloat16(), torch.randn(64), torch.randn(64)
    found = torch_norm.layer_norm(request, "cpu")(x, weight, bias)
    wanted = torch.nn.functional.layer_norm(x.double(), (64,), weight.double(), bias.double(), request.eps)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=0.02, rtol=0.005)


def test_what_was_not_announced_is_refused() -> None:
    """A bias is neither dropped nor made up."""  # requirement C7
    norm = hal.get_op("layer_norm", hidden_size=8, dtype="float32", bias=False)
    x, ones = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="bias is given, and this was bound with bias=False"):
        norm(x, ones, ones)
    with pytest.raises(ValueError, match="weight is missing, and should be float32"):
        norm(x)
    with pytest.raises(ValueError, match="a bias alone is not offered"):
        LayerNormRequest(hidden_size=8, weight=False)


def test_rows_of_one_element_are_left_to_the_reference() -> None:
    """There torch's operator subtracts two large numbers."""
    decided = hal.select(LayerNormRequest(hidden_size=1, dtype="float16"), device="cpu")
    assert decided.kernels() == {"call": "reference.layer_norm"}
