"""``rms_norm`` and ``fused_add_rms_norm`` by torch: the formula once more in Python's floats, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal.errors import InputError, NoKernelError
from hal_ops import _torch_rows
from hal_ops.fused_add_rms_norm import FusedAddRmsNormRequest
from hal_ops.fused_add_rms_norm.torch_norm import fused_add_rms_norm
from hal_ops.rms_norm import RmsNormRequest, reference, torch_norm

IMPLEMENTATIONS = {"reference": reference.rms_norm, "torch": torch_norm.rms_norm}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_hand(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    rows = []
    for row in x.tolist():
        root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        rows.append([v / root * (w + offset) for v, w in zip(row, weight.tolist(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_formula(name: str, eps: float, offset: float) -> None:
    request = RmsNormRequest(hidden_size=7, dtype="float32", eps=eps, weight_offset=offset)
    x, weight = torch.randn(5, 7), torch.randn(7)
    found = IMPLEMENTATIONS[name](request, "cpu")(x, weight)
    torch.testing.assert_close(found.double(), by_hand(x, weight, eps, offset), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weight_dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_it_is_rounded_once(name: str, weight_dtype: str) -> None:
    """Each half is the one nearest to the formula, which two roundings miss in one of some hundred elements."""
    request = RmsNormRequest(hidden_size=64, dtype="float16", weight_dtype=weight_dtype)
    x, weight = torch.randn(40, 64).half(), torch.randn(64).to(getattr(torch, weight_dtype))
    found = IMPLEMENTATIONS[name](request, "cpu")(x, weight)
    exact = by_hand(x.double(), weight.double(), request.eps, 0.0)
    step = torch.nextafter(found.abs(), found.new_full((), math.inf)).double() - found.abs().double()
    off = (found.double() - exact).abs() / step
    assert float(off.max()) < 0.52
    twice = (x.float() * (x.float().square().mean(-1, keepdim=True) + request.eps).rsqrt()).half() * weight
    off = (twice.half().double() - exact).abs() / step
    assert float(off.max()) > 0.6, "the test could not tell two roundings from one"


def test_the_residual_is_updated_in_place_and_the_norm_is_of_the_rounded_sum() -> None:
    request = FusedAddRmsNormRequest(hidden_size=48, dtype="bfloat16")
    x, residual, weight = torch.randn(6, 48).bfloat16(), torch.randn(6, 48).bfloat16(), torch.randn(48).bfloat16()
    total, address = x + residual, residual.data_ptr()
    found = fused_add_rms_norm(request, "cpu")(x, residual, weight)
    assert residual.data_ptr() == address
    assert torch.equal(residual, total)
    plain = torch_norm.rms_norm(RmsNormRequest(hidden_size=48, dtype="bfloat16"), "cpu")
    assert torch.equal(found, plain(total, weight))


def test_gradients_survive_the_next_layer() -> None:
    """Two layers share a residual; the second changes what the first's backward would need."""
    request = FusedAddRmsNormRequest(hidden_size=16, dtype="float32", needs_grad=True)
    norm = fused_add_rms_norm(request, "cpu")
    weight = torch.randn(16, requires_grad=True)
    x, start = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)

    def two(residual: Tensor) -> Tensor:
        first = norm(x, residual, weight)
        return norm(first.sin(), residual, weight).square().sum() + residual.cos().sum()

    def apart(residual: Tensor) -> Tensor:
        total = residual + x
        after = total + torch.nn.functional.rms_norm(total, (16,), weight, 1e-6).sin()
        return torch.nn.functional.rms_norm(after, (16,), weight, 1e-6).square().sum() + after.cos().sum()

    found = torch.autograd.grad(two(start.clone()), (x, start, weight))
    wanted = torch.autograd.grad(apart(start.clone()), (x, start, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_it_is_bound_like_any_op() -> None:
    norm = hal.get_op("rms_norm", hidden_size=32, dtype=torch.bfloat16, device="cpu")
    assert norm is hal.get_op("rms_norm", hidden_size=32, dtype=torch.bfloat16, device="cpu")
    assert norm.selection.kernels() == {"call": "torch.rms_norm"}
    assert norm(torch.randn(2, 3, 32).bfloat16(), torch.ones(32).bfloat16()).shape == (2, 3, 32)
    with pytest.raises(TypeError, match="no field 'epsilon'"):
        hal.get_op("rms_norm", hidden_size=32, epsilon=1e-5)
    with pytest.raises(TypeError, match=r"has no field 'op'.* Fields: hidden_size, dtype, "):
        hal.get_op("rms_norm", hidden_size=32, op="rms_norm")


def test_no_gradient_lands_on_a_kernel_without_backward() -> None:
    with pytest.raises(NoKernelError, match="needs_grad"):
        hal.get_op("rms_norm", hidden_size=32, needs_grad=True, kernel="triton")
    chosen = hal.get_op("rms_norm", hidden_size=32, needs_grad=True, dtype="float32")
    assert chosen.selection.kernels() == {"call": "torch.rms_norm"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden_size": 0}, "hidden_size=0: give a whole number"),
        ({"hidden_size": 8, "eps": -1.0}, "eps=-1.0: give a finite number of at least 0"),
        ({"hidden_size": 8, "eps": math.inf}, "eps=inf: give a finite number"),
        ({"hidden_size": 8, "weight_offset": math.nan}, "weight_offset=nan: give a finite number"),
        ({"hidden_size": 8, "weight_dtype": "int8"}, "weight_dtype=int8: give float16"),
        ({"hidden_size": 8, "dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn: give float16"),
        ({"hidden_size": 8, "deterministic": 1}, "deterministic=1: give True or False"),
    ],
)
def test_requests_that_mean_nothing(fields: dict[str, Any], text: str) -> None:
    for request in (RmsNormRequest, FusedAddRmsNormRequest):
        with pytest.raises(ValueError, match=text):
            request(**fields)


def test_weights_in_float32_are_no_neutral_request() -> None:
    assert RmsNormRequest(hidden_size=8).is_neutral("weight_dtype")
    assert not RmsNormRequest(hidden_size=8, weight_dtype="float32").is_neutral("weight_dtype")
    assert RmsNormRequest(hidden_size=8).replace(dtype="float16").weight_dtype == "float16"


def test_tensors_that_do_not_fit_are_refused() -> None:
    norm = hal.get_op("rms_norm", hidden_size=8, dtype="float32", device="cpu")
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(InputError, match=r"x is float32 \(3, 9\) on cpu, and should be float32 \[..., 8\] on cpu"):
        norm(torch.randn(3, 9), weight)
    with pytest.raises(InputError, match=r"x is float64"):
        norm(x.double(), weight)
    with pytest.raises(InputError, match="contiguous last dim"):
        norm(torch.randn(8, 3).T, weight)
    with pytest.raises(InputError, match=r"out is float32 \(2, 3, 8\) on cpu, and should be float32 \(3, 8\)"):
        norm(x, weight, out=torch.empty(2, 3, 8))


def test_rows_that_torch_would_miscount_are_given_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P24
    """On GPUs its kernels find rows in 32 bits; values and gradients are those of the whole."""
    monkeypatch.setattr(_torch_rows, "_rows_at_a_time", lambda x: 4)
    x, sizes = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True), []

    def normalize(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return torch.nn.functional.layer_norm(rows, (8,))

    found, right = _torch_rows.by_parts(normalize, x), torch.nn.functional.layer_norm(x, (8,))
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(found, right)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found * x, right * x)]
    torch.testing.assert_close(*gradients)
