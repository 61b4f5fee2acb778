"""Declarations by op: loaded when their op is asked for, and held to the same rules as those that are there at once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import PluginError, RegistrationError, UnknownKernelError
from hal_ops.attention import AttentionRequest

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]

ATTENTION, WRITE, NORM = ("attention",), ("kv_cache_write",), ("rms_norm",)
HEAD = """
ASKED = []

def norm(name):
    fields = {n: hal.Anything() for n in ("hidden_size", "dtype")}
    return hal.Kernel(name=name, op="rms_norm", phase="call", target="not_there:f", priority=hal.Band.PLUGIN, fields=fields)

def __getattr__(name):
    if name not in ("ATTENTION", "NORMS"):
        raise AttributeError(name)
    ASKED.append(name)
    return [kernel("acme.prefill")] if name == "ATTENTION" else NORM_KERNELS()
"""
MEMBERS = """
def kernels(self):
    return hal.ByOp({f"{__name__}:ATTENTION": ("attention",), f"{__name__}:NORMS": ("rms_norm",)})
"""


@pytest.fixture
def put(install: Install, kernel_source: str) -> Callable[..., Any]:
    def by_op(norms: str) -> Any:
        module = install(
            "acme", head=kernel_source + HEAD, members=MEMBERS, tail=f"def NORM_KERNELS(): return [{norms}]"
        )
        hal.devices()
        return sys.modules[module]

    return by_op


def test_an_op_is_loaded_when_it_is_asked_for(put: Callable[..., Any], status: Status) -> None:
    # requirement X9
    acme = put("norm('acme.rms_norm')")
    assert acme.ASKED == []
    first = _plugins.registry(ATTENTION)
    assert "acme.prefill" in first.kernels
    assert "acme.rms_norm" not in first.kernels
    assert acme.ASKED == ["ATTENTION"]
    second = _plugins.registry(NORM)
    assert acme.ASKED == ["ATTENTION", "NORMS"]
    assert {"acme.prefill", "acme.rms_norm"} <= set(second.kernels)
    assert "acme.rms_norm" not in first.kernels  # what was given out does not change
    assert status("acme").status == "loaded"
    assert acme.ASKED == ["ATTENTION", "NORMS"]


def test_the_whole_is_the_same_whatever_was_asked_for_first(put: Callable[..., Any]) -> None:
    put("norm('acme.rms_norm')")
    at_once = _plugins.registry()
    hal.reset()
    for ops in (NORM, WRITE, ATTENTION):
        _plugins.registry(ops)
    in_turn = _plugins.registry()
    assert set(in_turn.kernels) == set(at_once.kernels)
    assert in_turn.ops == at_once.ops
    assert in_turn.sources == at_once.sources


WRONG = {
    "a wrong declaration": ("norm('Not A Name')", "declared wrongly"),
    "no kernel at all": ("'acme.rms_norm'", "no attribute 'op'"),
    "a name that is taken": ("norm('torch.rms_norm')", "is registered by portable"),
    "another op": ("kernel('acme.decode')", "is listed for rms_norm alone"),
    "an error": ("1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_plugin_that_fails_later_is_left_out_whole(
    put: Callable[..., Any], status: Status, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    # requirement X9, P41, P3
    norms, text = WRONG[wrong]
    put(norms)
    assert "acme.prefill" in _plugins.registry(ATTENTION).kernels
    with caplog.at_level(logging.WARNING, logger="hal"):
        for ops in (NORM, ATTENTION, None):
            registry = _plugins.registry(ops)
            assert "acme" not in registry.platforms
            assert not {"acme.prefill", "acme.rms_norm"} & set(registry.kernels)
    assert "torch.rms_norm" in registry.kernels
    assert len([r for r in caplog.records if "plugin acme" in r.getMessage()]) == 1
    assert status("acme").status == "failed"
    assert text in status("acme").error


def test_it_is_fatal_where_it_was_asked_for_by_name(put: Callable[..., Any]) -> None:
    # requirement P7, R11
    put("norm('Not A Name')")
    with hal.override(platform="acme"):
        for _ in range(2):
            assert "acme.prefill" in _plugins.registry(ATTENTION).kernels
            with pytest.raises(PluginError, match=r"plugin acme \(acme-hal 1.2\) was asked for and failed"):
                _plugins.registry(NORM)


@pytest.mark.parametrize("name", ["alpha", "zeta"])
def test_what_is_not_by_op_is_held_against_all_of_its_op_at_once(
    install: Install, status: Status, kernel_source: str, name: str
) -> None:
    # requirement X9
    install(name, head=kernel_source + HEAD, members="def kernels(self): return [norm('torch.rms_norm')]")
    assert name not in _plugins.registry(ATTENTION).platforms
    assert f"'torch.rms_norm' of {name} ({name}-hal 1.2) is registered by portable" in status(name).error


def test_a_name_of_another_op_is_known_though_that_is_not_loaded() -> None:
    # requirement P1
    hal.reset()
    request = AttentionRequest(num_q_heads=2, num_kv_heads=2, head_dim=64)
    with pytest.raises(UnknownKernelError, match="but it serves rms_norm"):
        hal.select(request, device="cpu", kernel="torch.rms_norm")
    hal.reset()
    with hal.override(disable="torch.rms_norm"):
        assert hal.select(request, device="cpu").complete


def test_it_iterates_over_all_and_says_what_is_wrong() -> None:
    both = hal.ByOp({"hal._portable_ops:KERNELS": ("rms_norm",), "hal_ops.rms_norm:RMS_NORM": ("rms_norm",)})
    with pytest.raises(RegistrationError, match="is listed for rms_norm alone"):
        list(both)
    assert [op.name for op in hal.ByOp({"hal_ops.rms_norm:RMS_NORM": ("rms_norm",)})] == ["rms_norm"]
    with pytest.raises(TypeError, match="not the string 'rms_norm'"):
        hal.ByOp({"hal_ops.rms_norm:RMS_NORM": "rms_norm"})
