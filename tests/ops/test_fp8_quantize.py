"""``fp8_quantize`` by torch: values against lists of every number of a format, scales, blocks, and what is refused."""

from __future__ import annotations

import bisect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal_ops import FP8_DTYPES
from hal_ops.fp8_quantize import Fp8QuantizeRequest, reference, torch_quantize

IMPLEMENTATIONS = {"reference": reference.fp8_quantize, "torch": torch_quantize.fp8_quantize}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


MOST = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 240.0, "float8_e5m2": 57344.0, "float8_e5m2fnuz": 57344.0}


def numbers_of(fp8_dtype: str) -> list[float]:
    """Every finite number of the format, from the definition of its bits."""
    fraction, bias = {"float8_e4m3fn": (3, 7), "float8_e4m3fnuz": (3, 8), "float8_e5m2": (2, 15)}.get(
        fp8_dtype, (2, 16)
    )
    found = set()
    for code in range(128):
        exponent, rest = code >> fraction, code & ((1 << fraction) - 1)
        size = math.ldexp(rest + (1 << fraction if exponent else 0), max(exponent, 1) - bias - fraction)
        found |= {size, -size} if size <= MOST[fp8_dtype] else set()
    return sorted(found)


def nearest(value: float, numbers: list[float]) -> list[float]:
    """The number nearest to a value, or both where two are."""
    i = bisect.bisect_left(numbers, value)
    near = numbers[max(i - 1, 0) : i + 1] or [numbers[-1]]
    least = min(abs(value - n) for n in near)
    return [n for n in near if abs(value - n) == least]


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_values_are_the_nearest_numbers_of_the_format(name: str, fp8_dtype: str) -> None:
    numbers = numbers_of(fp8_dtype)
    assert len(numbers) in (2 * 127 - 1, 2 * 124 - 1, 2 * 128 - 1)
    request = Fp8QuantizeRequest(
        hidden_size=64, dtype="float32", fp8_dtype=fp8_dtype, granularity="tensor", static=True
    )
    x = torch.randn(20, 64) * torch.logspace(-6, 6, 20, base=4).unsqueeze(-1)
    values, scales = IMPLEMENTATIONS[name](request, "cpu")(x, torch.full((1,), 0.25))
    for value, found in zip((4 * x).flatten().tolist(), values.float().flatten().tolist(), strict=True):
        assert found in nearest(value, numbers), value
    assert scales.tolist() == [0.25]


def largest(part: Tensor) -> float:
    return max((abs(v) for v in part.flatten().tolist() if math.isfinite(v)), default=0.0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scales_are_those_of_the_largest_finite_values(name: str) -> None:
    x = torch.randn(5, 10)
    x[1, 3], x[2, 4], x[3] = math.inf, math.nan, 0.0

    def scales(**fields: Any) -> Tensor:
        request = Fp8QuantizeRequest(hidden_size=10, dtype="float32", fp8_dtype="float8_e4m3fn", **fields)
        return IMPLEMENTATIONS[name](request, "cpu")(x)[1]

    def wanted(*parts: Tensor) -> list[float]:
        return [pytest.approx(max(largest(part) / 448, 2.0**-126), rel=1e-6) for part in parts]

    assert scales(granularity="tensor").tolist() == wanted(x)
    assert scales(granularity="token").flatten().tolist() == wanted(*x)
    assert scales(granularity="token").shape == (5, 1)
    blocks = scales(granularity="block", block_size=4)
    assert blocks.shape == (5, 3)
    assert blocks.flatten().tolist() == wanted(*(row[i : i + 4] for row in x for i in (0, 4, 8)))
    tall = scales(granularity="block", block_size=4, block_rows=2)
    assert tall.shape == (3, 3)
    assert tall.flatten().tolist() == wanted(*(x[i : i + 2, j : j + 4] for i in (0, 2, 4) for j in (0, 4, 8)))


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_infinities_saturate_and_nan_stays(name: str, fp8_dtype: str) -> None:
    request = Fp8QuantizeRequest(hidden_size=4, dtype="bfloat16", fp8_dtype=fp8_dtype)
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]]).bfloat16()
    values, scales = IMPLEMENTATIONS[name](request, "cpu")(x)
    found = values.float().tolist()[0]
    assert found[:2] == [MOST[fp8_dtype], -MOST[fp8_dtype]]
    assert math.isnan(found[2])
    assert found[3] == MOST[fp8_dtype]
    assert scales.tolist() == [[pytest.approx(1 / MOST[fp8_dtype])]]


@pytest.mark.parametrize("granularity", ["tensor", "token", "block"])
def test_what_is_read_back_is_near(granularity: str) -> None:
    x = torch.randn(64, 256)
    request = Fp8QuantizeRequest(hidden_size=256, dtype="float32", fp8_dtype="float8_e4m3fn", granularity=granularity)
    values, scales = torch_quantize.fp8_quantize(request, "cpu")(x)
    scales = scales.repeat_interleave(128, -1) if granularity == "block" else scales
    assert float((values.float() * scales - x).norm() / x.norm()) < 0.03


def test_given_scales_are_copied() -> None:
    """Results share no memory with arguments, so a compiler may trace the call."""
    request = Fp8QuantizeRequest(hidden_size=4, dtype="float32", fp8_dtype="float8_e5m2", static=True)
    given = torch.ones(2, 1)
    _, scales = torch_quantize.fp8_quantize(request, "cpu")(torch.randn(2, 4), given)
    assert torch.equal(scales, given)
    assert scales.data_ptr() != given.data_ptr()


def test_the_generic_name_is_the_devices_own_format() -> None:  # requirement P29
    request = Fp8QuantizeRequest(hidden_size=8)
    for device, flavour in (("nvidia:sm_90", "float8_e4m3fn"), ("rocm:gfx942", "float8_e4m3fnuz")):
        with hal.simulate(device):
            decided = hal.select(request).request
            assert isinstance(decided, Fp8QuantizeRequest)
            assert decided.fp8_dtype == flavour
    with pytest.raises(ValueError, match="name the format exactly"):
        request.resolved(frozenset())


def test_block_sizes_mean_nothing_without_blocks() -> None:
    with pytest.raises(ValueError, match="block_rows=4 says nothing of granularity='token'"):
        Fp8QuantizeRequest(hidden_size=8, block_rows=4)
    block = Fp8QuantizeRequest(hidden_size=8, granularity="block", block_size=32, block_rows=4)
    assert block.group_elements == 128
    assert Fp8QuantizeRequest(hidden_size=8).group_elements == 8
    assert Fp8QuantizeRequest(hidden_size=8, granularity="tensor").group_elements == 1


def test_what_does_not_fit_is_refused() -> None:
    def make(**fields: Any) -> Any:
        fields |= {"hidden_size": 8, "dtype": "float32", "fp8_dtype": "float8_e4m3fn"}
        return hal.get_op("fp8_quantize", device="cpu", **fields)

    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="scale is missing, and this was bound with static=True"):
        make(static=True)(x)
    with pytest.raises(ValueError, match="scale is given, and this was bound with static=False"):
        make()(x, torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"should be float32 \(4, 1\)"):
        make(static=True)(x, torch.ones(1))
    with pytest.raises(ValueError, match=r"blocks of several rows need \[rows, 8\]"):
        make(granularity="block", block_rows=2)(x.view(2, 2, 8))
    with pytest.raises(ValueError, match="granularity='row'"):
        make(granularity="row")
    with pytest.raises(ValueError, match="fp8_dtype='float16'"):
        Fp8QuantizeRequest(hidden_size=8, fp8_dtype="float16")
