"""Declarations by op: loaded when their op is asked for, and held to the same rules as those that are there at once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import NoKernelError, PluginError, RegistrationError, UnknownKernelError
from hal_ops.attention import AttentionRequest

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]

ATTENTION, WRITE, NORM = ("attention",), ("kv_cache_write",), ("rms_norm",)
REQUEST = AttentionRequest(num_q_heads=2, num_kv_heads=2, head_dim=64, phases=("prefill",))
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
    with pytest.raises(UnknownKernelError, match="but it serves rms_norm"):
        hal.select(REQUEST, device="cpu", kernel="torch.rms_norm")
    hal.reset()
    with hal.override(disable="torch.rms_norm"):
        assert hal.select(REQUEST, device="cpu").complete


def test_it_iterates_over_all_and_says_what_is_wrong() -> None:
    both = hal.ByOp({"hal._portable_ops:KERNELS": ("rms_norm",), "hal_ops.rms_norm:RMS_NORM": ("rms_norm",)})
    with pytest.raises(RegistrationError, match="is listed for rms_norm alone"):
        list(both)
    assert [op.name for op in hal.ByOp({"hal_ops.rms_norm:RMS_NORM": ("rms_norm",)})] == ["rms_norm"]
    with pytest.raises(TypeError, match="not the string 'rms_norm'"):
        hal.ByOp({"hal_ops.rms_norm:RMS_NORM": "rms_norm"})
    with pytest.raises(TypeError, match=r"platforms: .* not the string 'cpu'"):
        hal.ByOp({}, platforms="cpu")
    for target, op in (("hal_ops.rms_norm:RMS_NORM", "rms_norm"), ("hal._portable_attention:KERNELS", "attention")):
        with pytest.raises(RegistrationError, match="which is not for acme, cpu alone, as was promised"):
            list(hal.ByOp({target: (op, "kv_cache_write", "merge_attention_states")}, platforms=("cpu", "acme")))
    assert len(list(hal.ByOp({"hal._cpu:KERNELS": ATTENTION}, platforms=("cpu", "acme")))) == 3


OWN = """
ASKED = []

def own(name):
    return kernel(name, platforms={PLATFORM: hal.Archs()})

def __getattr__(name):
    if name != "KERNELS":
        raise AttributeError(name)
    ASKED.append(name)
    return MADE()
"""


@pytest.fixture
def put_own(install: Install, kernel_source: str) -> Callable[..., Any]:
    """Install a plugin whose kernels are promised to be for its own devices alone."""

    def put_own(name: str, kernels: str, platform: str = "") -> Any:
        head = f"{kernel_source}PLATFORM = {platform or name!r}\n{OWN}"
        kept = f'hal.ByOp({{f"{{__name__}}:KERNELS": ("attention",)}}, platforms=({platform or name!r},))'
        members, tail = f"def kernels(self): return {kept}", f"def MADE(): return [{kernels}]"
        module = install(name, head=head, members=members, tail=tail)
        hal.devices()
        return sys.modules[module]

    return put_own


def test_what_is_for_its_own_devices_alone_waits_until_somebody_looks(put_own: Callable[..., Any]) -> None:
    # requirement X8, X9
    acme = put_own("acme", "own('acme.prefill')")
    before = hal.select(REQUEST, device="cpu")
    assert acme.ASKED == []
    receipt = before.receipt()
    assert acme.ASKED == ["KERNELS"]
    assert "for other vendors' devices only: acme" in before.explain()
    after = hal.select(REQUEST, device="cpu")
    assert "acme.prefill" in after.around.registry.kernels
    assert after.receipt() == receipt
    assert after.as_dict() == before.as_dict()
    assert hal.select(REQUEST, device="acme").kernels() == {"prefill": "acme.prefill"}


@pytest.mark.parametrize(
    "look",
    [
        lambda: hal.select(REQUEST, device="acme"),
        lambda: _plugins.registry(),
        lambda: hal.plugins(),
        lambda: hal.select(REQUEST, device="cpu").near_misses(),
        lambda: hal.select(REQUEST, device="cpu").as_dict(),
    ],
    ids=["its device", "the registry", "plugins", "near misses", "data"],
)
def test_who_asks_for_all_gets_all(put_own: Callable[..., Any], look: Callable[[], Any]) -> None:
    # requirement X9
    acme = put_own("acme", "own('acme.prefill')")
    hal.select(REQUEST, device="cpu")
    assert acme.ASKED == []
    look()
    assert acme.ASKED == ["KERNELS"]


def test_an_explanation_is_of_the_plugins_of_its_decision(put_own: Callable[..., Any]) -> None:
    # requirement C8
    put_own("acme", "own('acme.prefill')")
    with hal.override(plugins="-acme"):
        without = hal.select(REQUEST, device="cpu")
    decided = hal.select(REQUEST, device="cpu")
    with hal.override(plugins="-acme"):
        assert "acme" in decided.explain()
    assert "acme" not in without.explain()


def test_a_name_that_waits_can_be_asked_for_and_disabled(put_own: Callable[..., Any]) -> None:
    # requirement P1
    put_own("acme", "own('acme.prefill')")
    for name in ("acme", "acme.prefill"):
        hal.reset()
        forced = hal.select(REQUEST, device="cpu", kernel=name)
        assert forced.kernels() == {"prefill": None}
        assert "for acme only; this is cpu" in forced.explain()
        hal.reset()
        with hal.override(disable=name):
            assert f"disables {name}" in str(hal.select(REQUEST, device="cpu").as_dict())
    hal.reset()
    with pytest.raises(UnknownKernelError, match=r"Did you mean 'acme.prefill'"):
        hal.select(REQUEST, device="cpu", kernel="acme.prefil")
    hal.reset()
    with pytest.raises(NoKernelError, match=r"acme\.prefill .*for acme only"):
        hal.get_attention(num_q_heads=2, num_kv_heads=2, head_dim=64, device="cpu", kernel="acme")


@pytest.mark.parametrize(
    ("kernels", "text"),
    {
        "an error": ("1 / 0", "ZeroDivisionError"),
        "a name that is taken": ("own('torch_cpu.prefill')", "is registered by cpu"),
        "a broken promise": ("own('acme.prefill'), kernel('acme.decode')", "is not for acme alone, as was promised"),
    }.values(),
    ids=["an error", "a name that is taken", "a broken promise"],
)
def test_what_fails_after_it_waited_is_reported_and_left_out(
    put_own: Callable[..., Any], status: Status, caplog: pytest.LogCaptureFixture, kernels: str, text: str
) -> None:
    # requirement X9, P41, P3
    put_own("acme", kernels)
    decided = hal.select(REQUEST, device="cpu")
    assert "acme" in _plugins.registry(()).platforms
    with caplog.at_level(logging.WARNING, logger="hal"):
        assert "acme" not in decided.explain()
        assert "acme" not in _plugins.registry(()).platforms
        assert hal.select(REQUEST, device="cpu").receipt() == decided.receipt()
    assert len([r for r in caplog.records if "plugin acme" in r.getMessage()]) == 1
    assert status("acme").status == "failed"
    assert text in status("acme").error
    hal.reset()
    assert text in status("acme").error
    assert hal.select(REQUEST).device.platform != "acme"


def test_what_was_asked_for_by_name_does_not_wait(put_own: Callable[..., Any]) -> None:
    # requirement P7, R11
    put_own("acme", "1 / 0")
    with hal.override(plugins="acme"), pytest.raises(PluginError, match=r"acme .* was asked for and failed"):
        hal.select(REQUEST, device="cpu")


def test_nothing_waits_where_another_plugin_could_be_chosen(
    put: Callable[..., Any], put_own: Callable[..., Any]
) -> None:
    # requirement X9
    acme = put("norm('acme.rms_norm')")
    other = put_own("other", "own('acme.prefill')")
    assert hal.select(REQUEST, device="cpu").kernels() == {"prefill": "acme.prefill"}
    assert "ATTENTION" in acme.ASKED
    assert "KERNELS" in other.ASKED
    assert "other" not in _plugins.registry(()).platforms


def test_a_device_of_a_plugin_that_fails_is_not_the_default(put_own: Callable[..., Any]) -> None:
    # requirement P41
    put_own("acme", "1 / 0")
    assert hal.devices()[0].platform == "acme"
    assert hal.select(REQUEST).device.platform != "acme"
