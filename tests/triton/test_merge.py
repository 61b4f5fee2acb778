"""The merge of attention states in Triton against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops.merge_states import MergeStatesRequest
from hal_ops.merge_states.cases import make_case
from hal_ops.merge_states.torch_merge import merge as torch_merge
from hal_ops.merge_states.triton_merge import merge

HALF = ["float16", "bfloat16"]


@pytest.mark.parametrize("dtype", [*HALF, "float32"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (6, 80), (5, 24), (32, 128), (3, 256)])
def test_states_are_merged(
    dtype: str, heads: int, dim: int, device: str, assert_right: Callable[[Any], None]
) -> None:  # requirement B15
    request = MergeStatesRequest(num_heads=heads, v_head_dim=dim, dtype=dtype)
    case = make_case(request, device=device, tokens=37 if heads < 32 else 7)
    assert_right(case.check(merge(request, device)))


def test_dense_states_and_views_are_merged(device: str) -> None:
    request = MergeStatesRequest(num_heads=4, v_head_dim=32, dtype="float32")
    out = torch.randn(2, 3, 4, 64, device=device)[..., :32]
    lse = torch.randn(2, 4, 3, device=device).transpose(1, 2)
    other, other_lse = torch.randn(2, 3, 4, 32, device=device), torch.randn(2, 3, 4, device=device)
    found = merge(request, device)(out, lse, other, other_lse)
    for a, b in zip(found, torch_merge(request, device)(out, lse, other, other_lse), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_no_tokens_are_merged_into_none(device: str) -> None:
    request = MergeStatesRequest(num_heads=4, v_head_dim=32, dtype="float32")
    none = torch.zeros(0, 4, 32, device=device), torch.zeros(0, 4, device=device)
    out, lse = merge(request, device)(*none, *none)
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="does float16, bfloat16, float32, not float64"):
        merge(MergeStatesRequest(num_heads=1, v_head_dim=32, dtype="float64"), "cpu")
