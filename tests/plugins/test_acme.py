"""The example of a stranger's platform, from its sources: it takes part by its entry point alone.

Its own tests, HAL's conformance tests among them, are run in ``tests/packaging``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import DeviceError, UnknownOpError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/acme_platform"
DEVICES = '[{"arch": "acme2+mx", "name": "Acme Two", "acmert": "2.1"}, {"arch": "acme1", "acmert": "2.0"}]'

Decisions = Callable[[], dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What pip would leave of the example: its metadata, made of its own pyproject.toml."""
    project = (EXAMPLE / "pyproject.toml").read_text()
    name, version = (re.search(rf'^{key} = "(.+)"$', project, re.MULTILINE) for key in ("name", "version"))
    section = re.search(r'^\[project\.entry-points\."hal\.platforms"\]\n(\w+) = "(.+)"$', project, re.MULTILINE)
    assert name is not None
    assert version is not None
    assert section is not None
    info = tmp_path / "site" / "torch_hal_acme-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name[1]}\nVersion: {version[1]}\n")
    (info / "entry_points.txt").write_text(f"[hal.platforms]\n{section[1]} = {section[2]}\n")
    return info.parent


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Callable[[], None]]:
    """Install the example, on a machine with two of its devices."""

    def put() -> None:
        for path in (folder, EXAMPLE):
            monkeypatch.syspath_prepend(str(path))
        (folder / "devices.json").write_text(DEVICES)
        monkeypatch.setenv("ACME_DEVICES_FILE", str(folder / "devices.json"))
        hal.reset()

    yield put
    monkeypatch.undo()
    for name in [n for n in sys.modules if n.partition(".")[0] == "hal_acme"]:
        del sys.modules[name]
    hal.reset()


def test_a_platform_comes_without_a_change_of_ours(
    plug_in: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement X10, X9
    assert "acme" not in _plugins.registry().platforms
    plug_in()
    assert [str(d) for d in hal.devices("acme")] == ["acme:0 (Acme Two, acme2)", "acme:1 (acme1, acme1)"]
    record = next(r for r in hal.plugins() if r.name == "acme")
    assert (record.distribution, record.status) == ("torch-hal-acme", "loaded")
    monkeypatch.setenv("HAL_PLATFORM", "acme")
    assert hal.device().id == "acme:0"
    assert hal.device(1).id == "acme:1"


def test_other_decisions_stay_as_they_were(plug_in: Callable[[], None], decisions: Decisions) -> None:
    # requirement C2
    before = decisions()
    plug_in()
    during = decisions()
    for phases in during.values():
        for phase in phases.values():
            phase["candidates"] = [c for c in phase["candidates"] if not c["kernel"].startswith("acme.")]
    assert during == before


def test_a_new_op_comes_with_it(plug_in: Callable[[], None]) -> None:
    # requirement X10, X11
    torch = pytest.importorskip("torch")
    with pytest.raises(UnknownOpError, match="no op is called 'logit_softcap'"):
        hal.get_op("logit_softcap", cap=30.0)
    plug_in()
    logits = torch.linspace(-90, 90, 33).reshape(3, 11)
    right = 30 * torch.tanh(logits / 30)
    chosen = {}
    for device in ("acme:0", "acme:1", "cpu"):
        op = hal.get_op("logit_softcap", cap=30.0, dtype=torch.float32, device=device)
        chosen[device] = op.selection.kernels()["call"]
        torch.testing.assert_close(op(logits), right)
    assert chosen == {
        "acme:0": "acme.logit_softcap",
        "acme:1": "reference.logit_softcap",
        "cpu": "reference.logit_softcap",
    }


@pytest.mark.parametrize("forced", [{"kernel": "acme"}, {}], ids=["argument", "variable"])
def test_its_kernels_can_be_forced_and_are_refused_like_any_other(
    plug_in: Callable[[], None], monkeypatch: pytest.MonkeyPatch, forced: dict[str, str]
) -> None:
    # requirement P27, X1
    plug_in()
    if not forced:
        monkeypatch.setenv("HAL_OP_LOGIT_SOFTCAP", "acme")
    with pytest.raises(hal.errors.NoKernelError, match="needs_grad"):
        hal.get_op("logit_softcap", cap=30.0, needs_grad=True, device="acme:0", **forced)


def test_its_code_is_imported_when_it_is_chosen_and_not_before(plug_in: Callable[[], None]) -> None:
    # requirement X8, P40
    pytest.importorskip("torch")
    plug_in()
    hal.devices()
    assert "hal_acme" in sys.modules
    assert "hal_acme.attention" not in sys.modules
    hal.get_attention(num_q_heads=2, num_kv_heads=1, head_dim=64, phases=("prefill",), device="acme:0")
    assert "hal_acme.attention" in sys.modules


def test_taken_away_it_is_gone(plug_in: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement C2, X10
    plug_in()
    assert hal.devices("acme")
    monkeypatch.undo()
    hal.reset()
    with pytest.raises(DeviceError, match="no platform is called 'acme'"):
        hal.devices("acme")
