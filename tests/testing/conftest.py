"""Kernels that are right but for one thing, on hardware that does not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hal
from hal_ops import resolve_target
from hal_ops.attention import ATTENTION, AttentionRequest

Spoil = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def right(_right: Any, request: AttentionRequest, *args: Any, **kwargs: Any) -> Any:
    return _right(*args, **kwargs)


def prefill_factory(spoil: Spoil) -> Callable[..., Any]:
    def factory(request: Any, device: Any) -> Any:
        reference = resolve_target(ATTENTION.reference["prefill"])(request, device)

        def call(
            q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
            max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None, return_lse: Any = False,
        ) -> Any:  # fmt: skip
            return spoil(
                reference, request, q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, sinks=sinks, alibi_slopes=alibi_slopes,
                return_lse=return_lse,
            )  # fmt: skip

        return call

    return factory


def paged_factory(spoil: Spoil, phase: str) -> Callable[..., Any]:
    class Paged:
        def __init__(self, request: Any, device: Any) -> None:
            self.request = request
            self.reference = resolve_target(ATTENTION.reference[phase])(request, device)

        def plan(self, step: Any) -> Any:
            return self.reference.plan(step)

        def __call__(
            self, q: Any, k_cache: Any, v_cache: Any, step: Any, payload: Any, *, sinks: Any = None,
            alibi_slopes: Any = None, k_scale: Any = None, v_scale: Any = None, return_lse: Any = False,
        ) -> Any:  # fmt: skip
            return spoil(
                self.reference, self.request, q, k_cache, v_cache, step, payload, sinks=sinks,
                alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            )  # fmt: skip

    return Paged


@pytest.fixture
def spoiled(
    attention_kernel: Callable[..., hal.Kernel], kernel_module: Callable[..., str]
) -> Callable[..., hal.Kernel]:
    """Declare a kernel that calls ``spoil(reference, request, *args, **kwargs)``; without it, it is right."""

    def make(name: str = "spoiled.prefill", spoil: Spoil = right, **changes: Any) -> hal.Kernel:
        phase = name.rpartition(".")[2]
        factory = prefill_factory(spoil) if phase == "prefill" else paged_factory(spoil, phase)
        return attention_kernel(name, target=f"{kernel_module(factory=factory)}:factory", **changes)

    return make


@pytest.fixture
def small() -> Callable[..., AttentionRequest]:
    """A request of a few numbers."""

    def make(phase: str = "prefill", **fields: Any) -> AttentionRequest:
        values = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 16, "page_size": 16, "kv_layout": "NHD"}
        return AttentionRequest(**{**values, "phases": (phase,), **fields})

    return make
