"""Sequences that torch's memory-efficient attention cannot reach in 32 bits are refused before the launch.

The reach is made small here; ``tests/gpu/test_far_libraries.py`` goes past the real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from torch import Tensor

from hal_nvidia import _sdpa_efficient
from hal_ops.attention import AttentionRequest

REQUEST = AttentionRequest(num_q_heads=4, num_kv_heads=4, head_dim=64, dtype="float16", phases=("prefill",))
LENGTH = 10
COMPACT = LENGTH * 4 * 64
"""Elements of a sequence without gaps."""


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What torch's operator is called with. It reaches one sequence without gaps, and no further."""
    seen: list[Any] = []
    monkeypatch.setattr(_sdpa_efficient, "_FAR", COMPACT + 1)
    with nvidia.running("sdpa_efficient"):
        forward = _sdpa_efficient.forward
        monkeypatch.setattr(_sdpa_efficient, "forward", lambda *a, **k: (seen.append(a), forward(*a, **k))[1])
        yield seen


def projected(count: int) -> tuple[Tensor, ...]:
    """q, k and v of one projection, token after token."""
    torch.manual_seed(0)
    return torch.randn(count, LENGTH, 3, 4, 64).half().unbind(2)


def starts(count: int) -> dict[str, Any]:
    lengths = torch.arange(count + 1, dtype=torch.int32) * LENGTH
    return {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": LENGTH, "max_seqlen_k": LENGTH}


def test_a_sequence_with_gaps_is_refused(calls: list[Any]) -> None:  # requirement P24, C7
    three = projected(2)
    call = hardware.build("sdpa_efficient.prefill", REQUEST)
    refusal = r"a sequence of 10 tokens of q .* lies over \d+ elements, and torch's .* in 32 bits: give it without gaps"
    with pytest.raises(ValueError, match=refusal):
        call(*three)
    with pytest.raises(ValueError, match=refusal):
        call.for_dense(*three)
    with pytest.raises(ValueError, match=refusal):
        call(*(x.flatten(0, 1) for x in three), **starts(2))
    assert calls == []


def test_without_gaps_it_is_served_however_many_there_are(calls: list[Any]) -> None:  # requirement P24
    three = tuple(x.contiguous() for x in projected(5))
    call = hardware.build("sdpa_efficient.prefill", REQUEST)
    dense = call(*three)
    torch.testing.assert_close(call.for_dense(*three)(*three), dense)
    torch.testing.assert_close(call(*(x.flatten(0, 1) for x in three), **starts(5)), dense.flatten(0, 1))
    assert len(calls) == 3


@pytest.mark.parametrize("asked", [{"return_lse": True}, {"needs_grad": True}])
def test_more_lses_than_it_reaches_are_refused(asked: dict[str, Any], calls: list[Any]) -> None:  # requirement P24, C7
    """They have room for as many queries of each sequence as of the longest, in multiples of 32."""
    request = REQUEST.replace(**asked)
    call = hardware.build("sdpa_efficient.prefill", request)
    most, lse = COMPACT // (4 * 32), {"return_lse": True} if request.return_lse else {}
    near, far = (tuple(x.contiguous() for x in projected(count)) for count in (most, most + 1))
    call(*near, **lse)
    assert calls.pop()
    for tensors, lengths in ((far, {}), ([x.flatten(0, 1) for x in far], starts(most + 1))):
        with pytest.raises(ValueError, match=f"the LSEs of {most + 1} sequences of up to 10 queries of 4 heads take"):
            call(*tensors, **lengths, **lse)
    with pytest.raises(ValueError, match="the LSEs of") if request.needs_grad else contextlib.nullcontext():
        call.for_dense(*far)
    assert calls == []


def test_like_calls_are_looked_at_once_and_others_anew(calls: list[Any]) -> None:
    call = hardware.build("sdpa_efficient.prefill", REQUEST)
    near = tuple(x.contiguous() for x in projected(1))
    call(*near)
    call(*near)
    with pytest.raises(ValueError, match="in 32 bits"):
        call(*projected(1))
    call(*near)
    assert len(calls) == 3


@pytest.mark.parametrize("which", ["q", "k"])
def test_longer_sequences_of_like_tensors_are_looked_at_anew(
    which: str, calls: list[Any]
) -> None:  # requirement P24, C4
    """How far the sequences of ragged tensors lie follows from the lengths, of which strides tell nothing."""
    call = hardware.build("sdpa_efficient.prefill", REQUEST)
    three = [x.flatten(0, 1) for x in projected(1)]
    short = {f"cu_seqlens_{name}": torch.tensor([0, 4], dtype=torch.int32) for name in "qk"}
    bounds = {"max_seqlen_q": 4, "max_seqlen_k": 4}
    call(*three, **short, **bounds)
    longer = {f"cu_seqlens_{which}": torch.tensor([0, LENGTH], dtype=torch.int32), f"max_seqlen_{which}": LENGTH}
    with pytest.raises(ValueError, match=f"a sequence of {LENGTH} tokens of {which} .* in 32 bits"):
        call(*three, **{**short, **bounds, **longer})
    assert len(calls) == 1
