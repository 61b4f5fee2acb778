"""The CPU kernels and torch: gradients, which of its operators are called, and doing without the private one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hal_ops.attention import PHASES, AttentionRequest, _sdpa, reference, torch_sdpa
from hal_ops.attention.cases import AttentionCase, make_case

RequestOf = Callable[..., AttentionRequest]
AssertRight = Callable[[Sequence[Any]], None]


GRADIENTS = ({}, {"causal": False}, {"window": 3}, {"alibi": True}, {"sinks": True, "return_lse": True})


def gradients(case: AttentionCase, call: Any, learned: list[str]) -> list[Tensor]:
    """Of a weighted sum of all that comes back, by q, k, v and the learned tensors."""
    inputs = [x.clone().requires_grad_() for x in (*case.args, *(case.kwargs[name] for name in learned))]
    moved = dataclasses.replace(
        case, args=tuple(inputs[:3]), kwargs={**case.kwargs, **dict(zip(learned, inputs[3:], strict=True))}
    )
    torch.manual_seed(0)
    total = sum((x * torch.randn(x.shape)).sum() for x in moved.call(call).values())
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("fields", GRADIENTS)
@pytest.mark.parametrize("form", ["dense", "ragged"])
def test_gradients(request_of: RequestOf, fields: dict[str, Any], form: str) -> None:
    """Through out and lse, to q, k, v, sinks and slopes, as through the reference."""
    request = request_of(head_dim=4, v_head_dim=6, num_q_heads=4, needs_grad=True, **fields)
    case = make_case(request, "prefill", lengths=((5, 5),) * 2, form=form)
    learned = [name for name in case.kwargs if name in ("sinks", "alibi_slopes")]
    found, wanted = (gradients(case, module.prefill(request, "cpu"), learned) for module in (torch_sdpa, reference))
    assert len(found) == 3 + len(learned)
    for mine, right in zip(found, wanted, strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)


def test_gradients_after_a_mask_was_made_for_inference(request_of: RequestOf) -> None:
    request = request_of(window=4, needs_grad=True, head_dim=16)
    call = torch_sdpa.prefill(request, "cpu")
    q, k, v = make_case(request, "prefill", lengths=((19, 19),), form="dense").args
    with torch.inference_mode():
        call(q, k, v)
    q.requires_grad_()
    call(q, k, v).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


class Ops(TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not _sdpa.fused_gqa(), reason="this torch repeats k and v for grouped heads")
@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_dense_call_is_one_call_of_torch(request_of: RequestOf, causal: bool) -> None:
    # requirement B4
    call = torch_sdpa.prefill(request_of(causal=causal), "cpu")
    q, k, v = make_case(request_of(), "prefill", form="dense").args
    with Ops() as seen:
        call(q, k, v)
    assert set(seen.names) == {"transpose", "_scaled_dot_product_flash_attention_for_cpu"}
    assert len(seen.names) == 5


def test_a_window_costs_what_it_lets_through(request_of: RequestOf) -> None:
    """No mask of all queries by all keys, and no keys that no query of a tile sees."""
    request = request_of(window=32)
    q, k, v = make_case(request, "prefill", lengths=((2048, 2048),), form="dense").args
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    with Sizes():
        torch_sdpa.prefill(request, "cpu")(q, k, v)
    assert largest <= q.numel()


def test_an_operator_with_other_arguments_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*args: Any) -> Any:
        raise TypeError("unexpected argument")

    works = _sdpa.logsumexp_works.__wrapped__
    assert works()
    for other in (changed, lambda *args: (_sdpa._formula(*args)[0], _sdpa._formula(*args)[1] * 1.4427)):
        monkeypatch.setattr(_sdpa, "_operator", other)
        assert not works()


@pytest.mark.parametrize("phase", PHASES)
def test_without_torchs_private_operator(
    request_of: RequestOf, assert_right: AssertRight, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    # requirement B15
    assert _sdpa.logsumexp_works(), "the operator changed: the slow formula is used now, look at _sdpa.py"
    monkeypatch.setattr(_sdpa, "logsumexp_works", lambda: False)
    for fields in ({}, {"window": 6, "sinks": True}, {"alibi": True}):
        request = request_of(dtype="bfloat16", return_lse=True, **fields)
        assert_right(make_case(request, phase).check(getattr(torch_sdpa, phase)(request, "cpu")))


def test_where_torch_does_not_fuse_grouped_heads(
    request_of: RequestOf, assert_right: AssertRight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sdpa, "fused_gqa", lambda: False)
    for form in ("dense", "ragged"):
        request = request_of(dtype="bfloat16")
        assert_right(make_case(request, "prefill", form=form).check(torch_sdpa.prefill(request, "cpu")))
