"""The three gates, on numbers made for the purpose; wrong kernels are in ``test_mutations``."""

from __future__ import annotations

import pytest
import torch

from hal_ops.compare import Comparison, compare, compare_lse

DTYPES = ("float64", "float32", "bfloat16", "float16")


def outputs(dtype: str, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What is right, and the same rounded to ``dtype``."""
    torch.manual_seed(0)
    expected = scale * torch.randn(40, 3, 16, dtype=torch.float64)
    return expected, expected.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_right(dtype: str) -> None:
    for scale in (1.0, 1e-2, 100.0):
        expected, rounded = outputs(dtype, scale)
        assert compare(rounded, expected, dtype=dtype).ok
        assert compare(rounded, expected, rounded, dtype=dtype).ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 100.0])
def test_a_wrong_row_of_one_head_is_found(dtype: str, scale: float) -> None:
    # requirement X20
    expected, rounded = outputs(dtype, scale)
    wrong = rounded.clone()
    wrong[27, 1] *= 1.1
    found = compare(wrong, expected, rounded, dtype=dtype)
    assert not found.ok
    assert not found
    assert "rows 24 to 31 of head 1" in found.report()
    assert "at row 27" in found.report()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_anomalies_must_coincide(bad: float) -> None:
    expected, rounded = outputs("float32")
    wrong = rounded.clone()
    wrong[3, 2, 5] = bad
    for found in (compare(wrong, expected, dtype="float32"), compare(rounded, wrong.double(), dtype="float32")):
        assert len(found.failures) == 1
        assert "first at (3, 2, 5)" in found.report()
    assert compare(wrong, wrong.double(), dtype="float32").ok


def test_a_small_error_everywhere_fails_by_its_mean() -> None:
    expected, rounded = outputs("bfloat16")
    low = rounded.clone()
    low[0, 0, 0] += 0.5
    found = compare((expected + 0.03).bfloat16(), expected, low, dtype="bfloat16")
    assert any("mean error" in text for text in found.failures)
    assert not any("largest" in text for text in found.failures)


def test_one_far_element_fails_by_its_size() -> None:
    expected, rounded = outputs("bfloat16")
    wrong = rounded.clone()
    wrong[9, 1, 4] += 0.2
    found = compare(wrong, expected, rounded, dtype="bfloat16")
    text = "\n".join(found.failures)
    assert "largest error: 0.1% of the elements beyond the bound, the worst at (9, 1, 4)" in text
    assert f"expected {expected[9, 1, 4].item():g}" in text


def test_zeros_must_be_zeros() -> None:
    expected = torch.zeros(5, 2, 8, dtype=torch.float64)
    assert compare(expected.float(), expected, dtype="float32").ok
    assert not compare(expected.float() + 1e-3, expected, dtype="float32").ok


def test_shapes_and_dtypes() -> None:
    expected, rounded = outputs("float32")
    assert "the contract says (40, 3, 16)" in compare(rounded[:, :2], expected, dtype="float32").report()
    lse = expected[..., 0]
    assert compare_lse(lse.float(), lse, dtype="bfloat16").ok
    assert "the contract says float32" in compare_lse(lse.bfloat16(), lse, dtype="bfloat16").report()
    assert not compare_lse(lse.float().t(), lse, dtype="bfloat16").ok


def test_lse_bounds() -> None:
    lse = torch.linspace(-3, 8, 50, dtype=torch.float64).view(10, 5)
    lse[4] = -torch.inf
    right = lse.float()
    assert compare_lse(right, lse, dtype="bfloat16").ok
    for wrong in (
        right / 0.693,
        right + 0.02,
        right.masked_fill(right == -torch.inf, 0.0),
        right.nan_to_num(neginf=torch.inf),
    ):
        found = compare_lse(wrong, lse, dtype="bfloat16")
        assert not found.ok
        assert found.failures


def test_fp8_bounds_are_wider() -> None:
    expected, _ = outputs("float32")
    torch.manual_seed(1)
    noisy = expected * (1 + 0.04 * torch.randn_like(expected))
    assert not compare(noisy, expected, dtype="bfloat16").ok
    assert compare(noisy, expected, dtype="float8_e4m3fn").ok


def test_nothing_to_compare_is_right() -> None:
    empty = torch.zeros(0, 3, 16)
    assert compare(empty, empty.double(), empty, dtype="float32").ok
    assert compare_lse(empty[..., 0], empty[..., 0].double(), dtype="float32").ok


def test_reports_of_right_outputs() -> None:
    expected, rounded = outputs("bfloat16")
    assert str(compare(rounded, expected, dtype="bfloat16", name="extend 3/9")).startswith(
        "extend 3/9: right; max error"
    )
    assert Comparison("x", ("broken",)).report().splitlines()[1] == "  - broken"
