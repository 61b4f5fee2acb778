"""Binding: code is imported when its kernel is chosen, held against the contract, and never swapped in silence."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _bind, _settings
from hal._eligibility import Circumstances, why_not
from hal._ledger import Ledger
from hal.errors import NoKernelError
from hal_ops.attention import PHASES

SMALL = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": "float32"}


def prefill(request: Any, device: Any) -> Any:
    from hal_ops.attention import reference

    return reference.prefill(request, device)


def test_nothing_is_imported_to_be_considered(fake_platform: Any, library: Any, kernel_module: Any) -> None:
    # requirement P40, B11
    name = kernel_module(prefill=prefill)
    module = sys.modules.pop(name)
    fake_platform(kernels=library("lib", target=f"{name}:prefill"))
    hal.select(hal_request())
    assert name not in sys.modules
    sys.modules[name] = module


def hal_request(**changes: Any) -> Any:
    from hal_ops.attention import AttentionRequest

    return AttentionRequest(**{**SMALL, **changes})


def test_a_kernel_is_made_once_a_handle_and_shared_by_every_path(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any
) -> None:  # requirement C1, P34
    made: list[str] = []

    def spy(label: str) -> Any:
        def factory(request: Any, device: Any) -> Any:
            made.append(label)
            return prefill(request, device)

        return factory

    chosen, other = kernel_module(prefill=spy("chosen")), kernel_module(prefill=spy("other"))
    fake_platform(
        kernels=[
            attention_kernel("chosen.prefill", target=f"{chosen}:prefill"),
            attention_kernel("other.prefill", target=f"{other}:prefill", priority=hal.Band.PORTABLE),
        ]
    )
    first = hal.get_attention(**SMALL, phases=("prefill",))
    again = hal.get_attention(**SMALL, phases=("prefill",))
    assert first is again
    assert made == ["chosen"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'fast_lib'"), "missing module"),
        (ImportError("x.so: undefined symbol: _ZN3c105ErrorC2"), "built against another torch"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "missing shared library"),
        (ImportError("cannot import name 'f'"), "import error"),
    ],
)
def test_an_import_failure_becomes_a_reason_and_a_warning(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any, caplog: pytest.LogCaptureFixture,
    error: Exception, words: str,
) -> None:  # fmt: skip  # requirement P47, P45, B11
    def factory(request: Any, device: Any) -> Any:
        raise error

    broken = kernel_module(prefill=factory)
    fake_platform(
        kernels=[
            attention_kernel("broken.prefill", target=f"{broken}:prefill"),
            attention_kernel("works.prefill", priority=hal.Band.PORTABLE),
        ]
    )
    with caplog.at_level(logging.WARNING, "hal"):
        handle = hal.get_attention(**SMALL, phases=("prefill",))
    assert handle.kernels() == {"prefill": "works.prefill"}
    assert "broken.prefill is passed over" in caplog.text
    assert words in handle.explain()
    assert words in caplog.text


def test_a_factory_that_fails_is_passed_over_before_anything_ran(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any, caplog: pytest.LogCaptureFixture
) -> None:  # requirement P25, R16
    def factory(request: Any, device: Any) -> Any:
        raise RuntimeError("no kernel image")

    module = kernel_module(prefill=factory)
    fake_platform(
        kernels=[
            attention_kernel("broken.prefill", target=f"{module}:prefill"),
            attention_kernel("works.prefill", priority=hal.Band.PORTABLE),
        ]
    )
    with caplog.at_level(logging.WARNING, "hal"):
        handle = hal.get_attention(**SMALL, phases=("prefill",))
    assert handle.kernels() == {"prefill": "works.prefill"}
    assert "no kernel image" in handle.explain()


def test_a_factory_that_fails_for_one_request_serves_others(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any
) -> None:  # requirement P25, R16
    """A variant that does not compile says nothing about the next one; nor is it tried twice, whatever was left open."""
    tried: list[int] = []

    def factory(request: Any, device: Any) -> Any:
        tried.append(request.head_dim)
        if request.head_dim == 64:
            raise RuntimeError("ninja: build stopped")
        return prefill(request, device)

    module = kernel_module(prefill=factory)
    fields = {"head_dim": hal.OneOf(64, 128), "v_head_dim": hal.OneOf(64, 128)}
    fake_platform(
        kernels=[
            attention_kernel("picky.prefill", target=f"{module}:prefill", fields=fields),
            attention_kernel("works.prefill", priority=hal.Band.PORTABLE, fields=fields),
        ]
    )
    for dim, wanted in ((64, "works"), (128, "picky"), (64, "works")):
        for more in ({}, {"page_size": 32}, {"phases": "prefill"}):
            handle = hal.get_attention(**{**SMALL, "phases": ("prefill",), "head_dim": dim, **more})
            assert handle.kernels() == {"prefill": f"{wanted}.prefill"}
    assert tried.count(64) == 1
    refused = hal.get_attention(**{**SMALL, "phases": ("prefill",), "head_dim": 64}).explain()
    assert "build stopped" in refused


def test_an_error_in_a_call_reaches_the_caller_and_nothing_else_runs(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any
) -> None:  # requirement P42, R16
    import torch

    ran: list[str] = []

    def failing(request: Any, device: Any) -> Any:
        inner = prefill(request, device)

        def call(
            q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
            max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None, return_lse: bool = False,
        ) -> Any:  # fmt: skip
            ran.append("failing")
            if len(ran) < 3:
                raise torch.OutOfMemoryError("no memory")
            return inner(q, k, v)

        return call

    module = kernel_module(prefill=failing)
    fake_platform(kernels=[attention_kernel("failing.prefill", target=f"{module}:prefill")])
    handle = hal.get_attention(**SMALL, phases=("prefill",))
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            handle(q, k, k)
    handle(q, k, k)
    assert ran == ["failing"] * 3
    assert hal.get_attention(**SMALL, phases=("prefill",)) is handle


@pytest.mark.parametrize("bad", ["keyword", "swallows", "attribute"])
def test_an_implementation_that_could_drop_an_argument_is_refused(
    fake_platform: Any, attention_kernel: Any, kernel_module: Any, caplog: pytest.LogCaptureFixture, bad: str
) -> None:  # requirement A4, P24, P39
    def factory(request: Any, device: Any) -> Any:
        if bad == "keyword":
            return lambda q, k_cache, v_cache, step, payload, *, sinks=None: q
        if bad == "swallows":
            return lambda q, k_cache, v_cache, step, payload, **kwargs: q
        return lambda q, k, v, s, p, *, sinks=None, alibi_slopes=None, k_scale=None, v_scale=None, return_lse=False: q

    module = kernel_module(decode=factory)
    fake_platform(kernels=[attention_kernel("bad.decode", target=f"{module}:decode")])
    with caplog.at_level(logging.WARNING, "hal"):
        handle = hal.get_attention(**SMALL, phases=("decode",))
    assert handle.kernels()["decode"] == "reference.decode"
    words = {
        "keyword": "no keyword 'alibi_slopes'",
        "swallows": "could swallow an argument",
        "attribute": "no attribute 'plan'",
    }
    assert words[bad] in handle.explain()


def test_every_registered_kernel_that_can_be_made_here_takes_what_the_front_door_passes() -> None:  # requirement A4
    registry = hal._plugins.registry()
    here = hal.device("cpu")
    around = Circumstances(here, registry, _settings.current(), Ledger(Path("none")))
    made = []
    for kernel in (k for k in registry.kernels.values() if not k.platforms or here.platform in k.platforms):
        request = hal.testing.corners(kernel, device=here, limit=1)[0]
        if not why_not(kernel, request, around):
            _bind.build(kernel, registry.op(kernel.op), request, here)
            made.append(kernel.name)
    assert {f"reference.{p}" for p in PHASES} | {f"torch_cpu.{p}" for p in PHASES} <= set(made)
    assert {"torch.kv_cache_write", "torch.rms_norm"} <= set(made)


def test_falling_back_to_the_reference_warns_once_and_is_counted(
    fake_platform: Any, library: Any, caplog: pytest.LogCaptureFixture
) -> None:  # requirement R5, X11
    hal.reset()
    fake_platform(kernels=library("lib"))
    with caplog.at_level(logging.WARNING, "hal"):
        for cap in (10.0, 20.0):
            hal.get_attention(**SMALL, softcap=cap, phases=("prefill",))
    warnings = [r for r in caplog.records if "slow reference kernel reference.prefill" in r.message]
    assert len(warnings) == 1
    assert "softcap 10: lib.prefill does not declare it" in warnings[0].message
    assert _bind.fallback_counts["reference.prefill"] == 2
    with hal.override(strict=True), pytest.raises(NoKernelError):
        hal.get_attention(**SMALL, softcap=10.0, phases=("prefill",))


def test_a_forced_reference_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hal"):
        hal.get_attention(**SMALL, device="cpu", kernel="reference", phases=("prefill",))
    assert "slow reference" not in caplog.text
