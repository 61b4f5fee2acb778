"""Gradients that libraries lose in tensors of 2**31 elements: such calls take another form, or are cut up, or refused.

The limits are made small here; ``tests/gpu/test_large_libraries.py`` goes past the real ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from torch import Tensor

from hal_nvidia import _flash, _sdpa_cudnn
from hal_ops.attention import AttentionRequest

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
SEQUENCE = 20 * 4 * 64
"""Elements of one, of those below."""


def built(library: str, **fields: Any) -> Any:
    request = AttentionRequest(**{**BASE, "needs_grad": True, **fields}, phases=("prefill",))
    return hardware.build(f"{library}.prefill", request)


def inputs(kv_len: int = 20, dims: tuple[int, int] = (64, 64)) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((20, 4, dims[0]), (kv_len, 2, dims[0]), (kv_len, 2, dims[1]))
    return [torch.randn(5, *size).half().requires_grad_() for size in sizes]


def results(call: Any, three: list[Tensor], **extras: Tensor) -> list[Tensor]:
    out = call(*three, **extras)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), three)]


@pytest.fixture
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What torch's operator, or flash-attention 2, is called with."""
    library, seen = request.param, []
    with nvidia.running(library) as held:
        if held is None:
            module = importlib.import_module(f"hal_nvidia._{library}")
            forward = module.forward
            monkeypatch.setattr(module, "forward", lambda *a, **k: (seen.append(a), forward(*a, **k))[1])
        yield seen


@pytest.mark.parametrize(
    ("watched", "alibi"), [("sdpa_flash", False), ("fa2", False), ("fa2", True)], indirect=["watched"]
)
@pytest.mark.parametrize("kv_len", [20, 33, 7])
def test_flash_attention_2_is_called_in_its_ragged_form(
    kv_len: int,
    alibi: bool,
    watched: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # requirement P24
    three = inputs(kv_len)
    call = built(request.node.callspec.params["watched"], alibi=alibi)
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])} if alibi else {}
    dense = results(call, three, **slopes)
    monkeypatch.setattr(_flash, "_FAR_GRADIENTS", 5 * 128 * 4 * 64)
    assert call.for_dense(*three) is call
    ragged = results(call, three, **slopes)
    for mine, right in zip(ragged, dense, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-3, rtol=2e-3)
    if watched:
        assert watched[0][3] is None
        assert watched[-1][3].tolist() == [0, 20, 40, 60, 80, 100]
        assert watched[-1][0].shape == (100, 4, 64)


@pytest.mark.parametrize("library", ["sdpa_flash", "fa2"])
def test_without_gradients_and_below_the_limit_it_is_not(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with nvidia.running(library):
        three = inputs()
        monkeypatch.setattr(_flash, "_FAR_GRADIENTS", 5 * 128 * 4 * 64 + 1)
        assert not _flash.has_far_gradients(three[0], AttentionRequest(**BASE, needs_grad=True))
        monkeypatch.setattr(_flash, "_FAR_GRADIENTS", 1)
        assert not _flash.has_far_gradients(three[0], AttentionRequest(**BASE))
        call = built(library, needs_grad=False)
        assert call.for_dense(*three) is not call


@pytest.mark.parametrize("watched", ["sdpa_cudnn"], indirect=True)
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (64, 128)])
@pytest.mark.parametrize(
    ("causal", "kv_len", "counts"),
    [(True, 20, [2, 2, 1]), (True, 33, [2, 2, 1]), (True, 7, [5]), (False, 33, [2, 2, 1]), (False, 7, [2, 2, 1])],
)
def test_cudnn_gets_as_many_sequences_as_it_reaches(
    causal: bool,
    kv_len: int,
    counts: list[int],
    dims: tuple[int, int],
    watched: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # requirement P24
    """By the longer of queries and keys, and the wider of keys and values. A causal mask cuts off queries without keys."""
    three, call = inputs(kv_len, dims), built("sdpa_cudnn", causal=causal, head_dim=dims[0], v_head_dim=dims[1])
    whole = results(call, three)
    monkeypatch.setattr(_sdpa_cudnn, "_FAR_GRADIENTS", 2 * max(20, kv_len) * 4 * max(dims) + 1)
    watched.clear()
    parts = results(call, three)
    assert [args[0].shape[0] for args in watched] == counts
    for mine, right in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("watched", ["sdpa_cudnn"], indirect=True)
def test_a_sequence_that_cudnn_cannot_reach_is_refused(
    watched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement P24, C7
    call = built("sdpa_cudnn")
    monkeypatch.setattr(_sdpa_cudnn, "_FAR_GRADIENTS", SEQUENCE)
    with pytest.raises(ValueError, match=f"a sequence of 20 tokens has {SEQUENCE} elements, and cuDNN loses"):
        call(*inputs())
    assert watched == []
    out = built("sdpa_cudnn", needs_grad=False)(*inputs())
    assert out.shape == (5, 20, 4, 64)
