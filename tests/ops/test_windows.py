"""Masks read out of kernels bit by bit, and what counts as a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hal_ops.attention import PHASES, AttentionRequest, masks, normalize_window, reference, torch_sdpa
from hal_ops.attention.cases import indicator_case, visible_keys

RequestOf = Callable[..., AttentionRequest]

LENGTHS = ((1, 1), (1, 130), (5, 5), (7, 33), (16, 129), (33, 33), (130, 130))
WINDOWS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    *({"window": n} for n in (1, 2, 16, 128)),
    *({"causal": False, "window": w} for w in ((0, 0), (3, 0), (0, 3), (15, 16), (None, 2), (2, None))),
)


def seen_by_hand(request: AttentionRequest, lengths: Sequence[tuple[int, int]]) -> torch.Tensor:
    rows = []
    for q_len, kv_len in lengths:
        for i in range(q_len):
            p = kv_len - q_len + i
            left, right = request.window
            right = 0 if request.causal else right
            low = 0 if left is None else p - left
            high = kv_len if right is None else p + right
            rows.append([j < kv_len and low <= j <= high for j in range(request.v_head_dim)])
    return torch.tensor(rows)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("module", [reference, torch_sdpa])
def test_indicator(request_of: RequestOf, module: Any, phase: str) -> None:
    # requirement E8, X18, B16
    for fields in WINDOWS:
        request = request_of(head_dim=4, v_head_dim=130, **fields)
        case = indicator_case(request, phase, lengths=LENGTHS)
        out = case.call(getattr(module, phase)(request, "cpu"))["out"]
        seen = seen_by_hand(request, LENGTHS)
        assert torch.equal(visible_keys(case), seen)
        assert torch.equal(out > 0, seen.unsqueeze(1).expand_as(out))
        weights = seen / seen.sum(1, keepdim=True)
        torch.testing.assert_close(out, weights.unsqueeze(1).expand_as(out))


def test_indicator_with_more_queries_than_keys(request_of: RequestOf) -> None:
    lengths = ((9, 4), (5, 0), (20, 19))
    for fields in WINDOWS:
        request = request_of(head_dim=4, v_head_dim=20, **fields)
        case = indicator_case(request, "prefill", lengths=lengths)
        for module in (reference, torch_sdpa):
            out = case.call(module.prefill(request, "cpu"))["out"]
            seen = seen_by_hand(request, lengths).unsqueeze(1).expand_as(out)
            assert torch.equal(out > 0, seen)
            assert (out.sum(-1) - seen.any(-1).float()).abs().max() < 1e-5


def test_indicator_over_an_fp8_cache(request_of: RequestOf) -> None:
    # requirement B6
    request = request_of(head_dim=4, v_head_dim=64, dtype="bfloat16", kv_dtype="float8_e4m3fn", window=5)
    case = indicator_case(request, "extend", lengths=((4, 40), (1, 64)))
    for module in (reference, torch_sdpa):
        out = case.call(module.extend(request, "cpu"))["out"]
        assert torch.equal(out > 0, visible_keys(case).unsqueeze(1).expand_as(out))


def test_nothing_left_of_the_window_is_read(request_of: RequestOf) -> None:
    """Pages that a window has left behind may be given away: their slots hold NaN, their ids anything."""
    request = request_of(window=16, return_lse=True)
    case = indicator_case(request.replace(v_head_dim=128), "extend", lengths=((3, 100), (1, 80)))
    step = case.args[3]
    right = case.call(reference.extend(case.request, "cpu"))
    step.block_table[0, : (100 - 3 - 15) // 16] = 2**31 - 1
    step.block_table[1, : (80 - 1 - 15) // 16] = -1
    for module in (reference, torch_sdpa):
        found = case.call(module.extend(case.request, "cpu"))
        torch.testing.assert_close(found, right)


def test_one_hot_values_need_room(request_of: RequestOf) -> None:
    with pytest.raises(ValueError, match="33 keys do not fit a one-hot v of 32 elements"):
        indicator_case(request_of(), "extend", lengths=((1, 33),))


@pytest.mark.parametrize(
    ("window", "causal", "wanted"),
    [
        (None, True, (None, None)),
        (-1, True, (None, None)),
        ((None, None), True, (None, None)),
        ((-1, -1), True, (None, None)),
        (1, True, (0, 0)),
        (16, True, (15, 0)),
        (128, True, (127, 0)),
        ((127, None), True, (127, 0)),
        ((127, 0), True, (127, 0)),
        ([127, -1], True, (127, 0)),
        ((None, 5), True, (None, None)),
        ((3, 5), False, (3, 5)),
        ((None, 0), False, (None, 0)),
        ((0, 0), False, (0, 0)),
        (None, False, (None, None)),
    ],
)
def test_windows_have_one_form(window: Any, causal: bool, wanted: tuple[Any, Any]) -> None:
    # requirement E8
    assert normalize_window(window, causal=causal) == wanted


@pytest.mark.parametrize(
    "window", [0, -2, (1, 2, 3), ((1, 2), (3, 4)), (-2, 0), "8", (1.5, 0), True, (None,), 2.0, ((None, None), None)]
)
def test_other_windows_are_errors(window: Any) -> None:
    # requirement E8
    with pytest.raises(ValueError, match="window="):
        normalize_window(window)


def test_key_ranges_and_empty_rows_agree_with_the_mask() -> None:
    for q_len in range(6):
        for kv_len in range(8):
            for limits in ((None, None), (None, 0), (2, 0), (0, 0), (None, 3), (1, 2), (3, None)):
                seen = masks.visible(masks.relative(q_len, kv_len, kv_len - q_len), limits)
                assert masks.empty_rows(q_len, kv_len, limits[1]) == int((~seen.any(1)).sum())
                for first in range(q_len):
                    for last in range(first, q_len):
                        low, high = masks.key_range(first, last, q_len, kv_len, limits)
                        used = seen[first : last + 1].any(0).nonzero().flatten().tolist()
                        assert 0 <= low <= high <= kv_len
                        assert set(used) <= set(range(low, high))
                        if used:
                            assert (low, high) == (used[0], used[-1] + 1)
