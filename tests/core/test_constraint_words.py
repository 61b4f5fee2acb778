"""How constraints say what they allow: short, and true."""

from __future__ import annotations

import pytest

import hal


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (((64, 64), (192, 128)), "with head_dim 64: 64 or head_dim 192: 128"),
        (((64, 64), (96, 96), (128, 128)), "the same as head_dim, where that is 64, 96 or 128"),
        (
            (*((d, d) for d in range(8, 129, 8)), (192, 128)),
            "the same as head_dim, where that is one of 16 from 8 to 128, or with head_dim 192: 128",
        ),
    ],
)
def test_pairs_of_equals_are_said_once(pairs: tuple[tuple[int, int], ...], words: str) -> None:  # requirement P28
    assert hal.Pairs("head_dim", *pairs).allowed() == words
