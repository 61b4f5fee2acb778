"""``rotary_embedding`` by torch: rotations as complex numbers; the scaled tables; what is refused."""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hal_ops.rotary_embedding import LinearScaling, Llama3Scaling, RotaryEmbeddingRequest, YarnScaling, torch_rotary
from hal_ops.rotary_embedding import reference as references
from hal_ops.rotary_embedding.tables import rotary_frequencies, rotary_tables

IMPLEMENTATIONS = {"reference": references.rotary_embedding, "torch": torch_rotary.rotary_embedding}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_hand(x: Tensor, positions: list[int], rotary_dim: int, style: str) -> Tensor:
    """Each pair as a complex number, times e to the i times its angle."""
    result = x.double().clone()
    for token, position in enumerate(positions):
        for head in range(x.shape[1]):
            for i in range(rotary_dim // 2):
                one, two = (i, i + rotary_dim // 2) if style == "neox" else (2 * i, 2 * i + 1)
                angle = position * 10000.0 ** (-2 * i / rotary_dim)
                z = complex(x[token, head, one], x[token, head, two]) * cmath.exp(1j * angle)
                result[token, head, one], result[token, head, two] = z.real, z.imag
    return result


@pytest.mark.parametrize("rotary_dim", [8, 6])
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_pairs_are_turned(name: str, style: str, rotary_dim: int) -> None:
    positions = [0, 1, 2, 17, 0, 5]  # two sequences, one behind the other
    request = RotaryEmbeddingRequest(
        num_q_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=rotary_dim, style=style, dtype="float32"
    )
    q, k = torch.randn(6, 2, 8), torch.randn(6, 1, 8)
    tables = rotary_tables(rotary_dim, 20)
    found = IMPLEMENTATIONS[name](request, "cpu")(q, k, *tables, torch.tensor(positions, dtype=torch.int32))
    for mine, x in zip(found, (q, k), strict=True):
        torch.testing.assert_close(mine.double(), by_hand(x, positions, rotary_dim, style), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("style", ["neox", "interleaved"])
def test_products_depend_on_the_distance_alone(style: str) -> None:
    request = RotaryEmbeddingRequest(num_q_heads=1, num_kv_heads=1, head_dim=64, style=style, dtype="float64")
    q, k = torch.randn(1, 1, 64).double().expand(50, 1, 64), torch.randn(1, 1, 64).double().expand(50, 1, 64)
    tables = rotary_tables(64, 50, dtype="float32")
    turned_q, turned_k = torch_rotary.rotary_embedding(request, "cpu")(q, k, *tables, torch.arange(50))
    products = turned_q[:, 0] @ turned_k[:, 0].T
    for distance in (0, 3, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_a_position_outside_the_tables_raises() -> None:
    request = RotaryEmbeddingRequest(num_q_heads=1, num_kv_heads=1, head_dim=4, dtype="float32")
    q = torch.randn(1, 1, 4)
    for position in (-1, 3):
        with pytest.raises(IndexError):
            torch_rotary.rotary_embedding(request, "cpu")(q, q, *rotary_tables(4, 3), torch.tensor([position]))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rotary_dim": 7}, r"rotary_dim=7: give an even number up to head_dim \(8\)"),
        ({"rotary_dim": 10}, "rotary_dim=10: give an even number"),
        ({"style": "gptj"}, "style='gptj': choose 'neox' or 'interleaved'"),
        ({"table_dtype": "float8_e5m2"}, "table_dtype=float8_e5m2: give float16"),
    ],
)
def test_requests_that_mean_nothing(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RotaryEmbeddingRequest(**{"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, **fields})


def test_far_positions_are_exact() -> None:
    cos, _ = rotary_tables(4, 1_000_001, base=10000.0)
    assert float(cos[1_000_000, 0]) == pytest.approx(math.cos(1_000_000), abs=1e-6)
    assert float(cos[999_999, 1]) == pytest.approx(math.cos(9999.99), abs=1e-6)


def test_linear_scaling_divides_positions() -> None:
    scaled, plain = rotary_tables(16, 40, scaling=LinearScaling(4.0)), rotary_tables(16, 10)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a[::4], b)


def test_llama3_keeps_the_fast_and_divides_the_slow() -> None:
    plain = rotary_frequencies(128, base=500000.0)
    scaled = rotary_frequencies(128, base=500000.0, scaling=Llama3Scaling())
    ratios = [a / b for a, b in zip(scaled, plain, strict=True)]
    turns = [f * 8192 / (2 * math.pi) for f in plain]
    assert [r for r, t in zip(ratios, turns, strict=True) if t >= 4] == pytest.approx(
        [1.0] * sum(t >= 4 for t in turns)
    )
    assert [r for r, t in zip(ratios, turns, strict=True) if t <= 1] == pytest.approx(
        [1 / 8] * sum(t <= 1 for t in turns)
    )
    between = [(r, t) for r, t in zip(ratios, turns, strict=True) if 1 < t < 4]
    assert between
    for ratio, turn in between:  # the smooth factor of Llama 3.1's code
        smooth = (turn - 1) / 3
        assert ratio == pytest.approx((1 - smooth) / 8 + smooth)


YARN = YarnScaling(factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0)


def test_yarn_keeps_the_first_pairs_and_divides_the_last() -> None:
    """The ramp of DeepSeek-V3's 64 rotary elements: pairs 10 to 23 (of its published code, by its own numbers)."""
    plain, scaled = (rotary_frequencies(64, scaling=s) for s in (None, YARN))
    ratios = [a / b for a, b in zip(scaled, plain, strict=True)]
    assert ratios[:11] == pytest.approx([1.0] * 11)
    assert ratios[23:] == pytest.approx([1 / 40] * 9)
    steps = [a - b for a, b in itertools.pairwise(ratios[10:24])]
    assert steps == pytest.approx([(1 - 1 / 40) / 13] * 13)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (YarnScaling(factor=32.0, original_max_position=4096), 0.1 * math.log(32) + 1),
        (YarnScaling(factor=1.0, original_max_position=4096), 1.0),
        (YarnScaling(factor=32.0, original_max_position=4096, attention_factor=0.7), 0.7),
        (YARN, 1.0),
        (YarnScaling(factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=0.0), 0.1 * math.log(40) + 1),
        (
            YarnScaling(factor=40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=1.4),
            (0.0707 * math.log(40) + 1) / (0.14 * math.log(40) + 1),
        ),
    ],
)
def test_yarn_scales_the_tables(scaling: YarnScaling, factor: float) -> None:
    assert scaling.table_factor() == pytest.approx(factor)
    cos, sin = rotary_tables(64, 9, scaling=scaling)
    assert torch.allclose(cos.square() + sin.square(), torch.tensor(factor**2), atol=1e-5)


def test_yarn_without_rounding_of_the_ramp() -> None:
    """gpt-oss: ``truncate`` false; the ramp starts inside a pair."""
    scalings = [YarnScaling(factor=32.0, original_max_position=4096, truncate=t) for t in (True, False)]
    rounded, exact = (rotary_frequencies(64, base=150000.0, scaling=s) for s in scalings)
    plain = rotary_frequencies(64, base=150000.0)
    low = 64 * math.log(4096 / (2 * math.pi * 32)) / (2 * math.log(150000.0))
    high = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(150000.0))
    pair = math.ceil(low) + 2
    share = (pair - low) / (high - low)
    assert exact[pair] == pytest.approx(plain[pair] * (share / 32 + 1 - share))
    assert exact[pair] != pytest.approx(rounded[pair], rel=1e-3)


@pytest.mark.parametrize(("given", "text"), [((5, 10000.0), "rotary_dim=5"), ((4, 1.0), "base=1.0")])
def test_tables_that_mean_nothing(given: tuple[int, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rotary_tables(given[0], 4, base=given[1])
