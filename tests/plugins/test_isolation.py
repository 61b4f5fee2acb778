"""A plugin that fails leaves nothing behind, disturbs no other, is reported once, and is fatal only by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import DeviceError, PluginError

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]
Decisions = Callable[[], dict[str, Any]]

OP = """
import dataclasses
from typing import ClassVar
import hal_ops

@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish(hal_ops.Request):
    op: ClassVar[str] = "acme_op"
    dtype: str = hal_ops.required(default="bfloat16", code="dtype")

OP = hal_ops.Op(name="acme_op", summary="an op for tests", request=Wish)

def op_kernel(name):
    return hal.Kernel(name=name, op="acme_op", phase="call", target="not_there:f", priority=hal.Band.PLUGIN,
                      fields={"dtype": hal.Anything()})
"""

BROKEN = {
    "import": {"head": "raise OSError('libacme.so.2: cannot open shared object file')"},
    "import exits": {"head": "import sys; sys.exit('acme: no license')"},
    "class": {"members": "def is_available(self): return True"},
    "construction": {"members": "def __init__(self): raise RuntimeError('no handle')"},
    "ops": {"members": "def ops(self): raise RuntimeError('no ops')"},
    "kernels": {"members": "def kernels(self): raise RuntimeError('no kernels')"},
    "kernels midway": {
        "head": OP,
        "members": """
            def ops(self): yield OP
            def kernels(self):
                yield op_kernel("acme.acme_op")
                yield kernel("acme.prefill")
                raise RuntimeError("the second half is missing")
        """,
    },
    "a wrong declaration": {"members": "def kernels(self): return [kernel('acme.prefill'), kernel('Not A Name')]"},
    "no kernel at all": {"members": "def kernels(self): return ['acme.prefill']"},
    "nothing": {"members": "def kernels(self): return None"},
    "libraries": {
        "members": "def libraries(self):\n    yield hal.Library('acme-lib')\n    raise RuntimeError('no more')"
    },
    "rank": {"members": "rank = 'high'"},
    "errata": {"members": "def errata(self): return [hal.Erratum(id='A-1', kernels=('*',), summary='s')]"},
}


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_failing_plugin_is_rolled_back_whole(
    install: Install, status: Status, decisions: Decisions, kernel_source: str, broken: str
) -> None:
    # requirement X9, P41, R11
    install("other", head=kernel_source, members="def kernels(self): return [kernel('other.prefill')]")
    before = _plugins.registry()
    decided = decisions()
    install("acme", **{**BROKEN[broken], "head": kernel_source + BROKEN[broken].get("head", "")})
    after = _plugins.registry()
    assert status("acme").status == "failed"
    assert status("acme").error
    for part in ("platforms", "ops", "kernels", "libraries", "sources"):
        assert list(getattr(after, part)) == list(getattr(before, part))
    assert after.errata == before.errata
    assert decisions() == decided
    assert {d.platform for d in hal.devices()} == {"cpu", "other"}


def test_a_plugin_whose_op_failed_to_come_fails_in_its_turn(
    install: Install, status: Status, kernel_source: str
) -> None:
    # requirement P41
    install("zeta", head=OP, members="def ops(self): return [OP]\ndef kernels(self): raise RuntimeError('broken')")
    install("alpha", head=OP, members="def kernels(self): return [op_kernel('alpha.acme_op')]")
    assert "broken" in status("zeta").error
    assert "no op is called 'acme_op'" in status("alpha").error
    assert "acme_op" not in {kernel.op for kernel in _plugins.registry().kernels.values()}


def test_a_kernel_may_come_before_the_op_that_another_brings(install: Install, status: Status) -> None:
    install("zeta", head=OP, members="def ops(self): return [OP]")
    install("alpha", head=OP, members="def kernels(self): return [op_kernel('alpha.acme_op')]")
    assert status("alpha").status == status("zeta").status == "loaded"


def test_a_failure_is_logged_once_with_its_traceback(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    # requirement P3
    install("acme", head="raise OSError('libacme.so.2 is missing')")
    with caplog.at_level(logging.WARNING, logger="hal"):
        for _ in range(2):
            hal.devices()
            hal.plugins()
            with hal.override(platform="cpu"):
                hal.devices()
    records = [r for r in caplog.records if "acme" in r.getMessage()]
    assert len(records) == 1
    assert records[0].levelno == logging.WARNING
    assert "plugin acme (acme-hal 1.2) is left out: OSError: libacme.so.2 is missing" in records[0].getMessage()
    assert records[0].exc_info is not None
    assert isinstance(records[0].exc_info[1], OSError)


@pytest.mark.parametrize("by", ["HAL_PLATFORM", "HAL_PLUGINS", "hal.override", "config"])
def test_a_plugin_asked_for_by_name_is_fatal(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    # requirement P7, P3, R11
    install("acme", head="raise OSError('libacme.so.2 is missing')", version="4.5")
    if by.startswith("HAL_"):
        monkeypatch.setenv(by, "acme")
    if by == "config":
        (tmp_path / "config.toml").write_text('plugins = ["acme"]\n')
        monkeypatch.setenv("HAL_CONFIG", str(tmp_path / "config.toml"))
    with hal.override(**({"platform": "acme"} if by == "hal.override" else {})):
        for _ in range(2):
            with pytest.raises(PluginError) as caught:
                hal.devices()
    assert "plugin acme (acme-hal 4.5) was asked for and failed: OSError: libacme.so.2 is missing" in str(caught.value)
    assert (caught.value.plugin, caught.value.distribution) == ("acme", "acme-hal")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_failed_plugin_shows_up_where_its_devices_are_asked_for(install: Install) -> None:
    # requirement P9, R11
    install("acme", head="raise OSError('libacme.so.2 is missing')")
    with pytest.raises(DeviceError, match=r"plugin acme \(acme-hal 1.2\) failed: OSError: libacme.so.2 is missing"):
        hal.devices("acme")
    with pytest.raises(DeviceError, match=r"plugin acme \(acme-hal 1.2\) failed: OSError: libacme.so.2 is missing"):
        hal.device("acme:0")


def test_a_keyboard_interrupt_is_not_taken_for_a_failure(install: Install) -> None:
    install("acme", head="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        hal.devices()


BAD_PROBES = {
    "raises": "raise OSError('libacme.so.2 is missing')",
    "raises ours": "raise hal.errors.DeviceError('no bus')",
    "gives None": "return None",
    "gives a list": "return [hal.Device(platform='acme', arch=hal.Arch('acme', 'x1'))]",
    "gives another's device": "return hal.Probe((hal.Device(platform='cpu', arch=hal.Arch('cpu', 'x1')),))",
    "gives words": "return hal.Probe(('acme:0',))",
    "exits": "raise SystemExit(3)",
    "gives an arch by name": "return hal.Probe((hal.Device(platform='acme', arch='x1'),))",
    "gives another's arch": "return hal.Probe((hal.Device(platform='acme', arch=hal.Arch('cpu', 'x1')),))",
    "gives capabilities in a list": (
        "return hal.Probe((hal.Device(platform='acme', arch=hal.Arch('acme', 'x1'), capabilities=['bf16']),))"
    ),
    "gives a version in words": (
        "return hal.Probe((hal.Device(platform='acme', arch=hal.Arch('acme', 'x1'), driver='570.1'),))"
    ),
    "gives evidence in words": "return hal.Probe((), ('no bus',))",
    "gives one device alone": "return hal.Probe(hal.Device(platform='acme', arch=hal.Arch('acme', 'x1')))",
}


@pytest.mark.parametrize("probe", BAD_PROBES, ids=str)
def test_a_bad_probe_hides_no_other_platform(install: Install, caplog: pytest.LogCaptureFixture, probe: str) -> None:
    # requirement P3, P41, X9
    install("acme", head="import hal.errors", members=f"def probe(self, environ): {BAD_PROBES[probe]}")
    install("other")
    with caplog.at_level(logging.WARNING, logger="hal"):
        assert {d.platform for d in hal.devices()} == {"cpu", "other"}
        hal.devices()
    (evidence,) = hal.probe_report()["acme"].evidence
    assert evidence.text.startswith("probe failed: ")
    records = [r for r in caplog.records if "acme" in r.getMessage()]
    assert len(records) == 1
    assert records[0].exc_info is not None


@pytest.mark.parametrize("by", ["HAL_PLATFORM", "HAL_PLUGINS"])
@pytest.mark.parametrize("first", [False, True], ids=["at once", "after a quiet failure"])
def test_a_bad_probe_is_fatal_by_name(install: Install, monkeypatch: pytest.MonkeyPatch, by: str, first: bool) -> None:
    # requirement P7, P3
    install("acme", members="def probe(self, environ): raise OSError('libacme.so.2 is missing')")
    if first:
        hal.devices()
    monkeypatch.setenv(by, "acme")
    with pytest.raises(DeviceError) as caught:
        hal.devices()
    assert "plugin acme (acme-hal 1.2) was asked for, and its probe failed" in str(caught.value)
    assert "OSError: libacme.so.2 is missing" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_nothing_imports_a_plugin_but_its_use(install: Install) -> None:
    # requirement R11
    module = install("acme", head="raise OSError('libacme.so.2 is missing')")
    assert hal.Version.parse("1.2").known
    assert hal.get_attention.__name__ == "get_attention"
    assert module not in sys.modules
