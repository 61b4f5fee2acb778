"""Names are read before anything is imported; what a setting names must exist."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import DeviceError, PluginError, SettingError

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]


def test_an_installed_plugin_is_loaded_on_first_use(install: Install, status: Status) -> None:
    # requirement X9
    module = install("acme")
    assert module not in sys.modules
    assert hal.devices("acme")[0].id == "acme:0"
    assert module in sys.modules
    assert status("acme") == hal.PluginRecord("acme", "acme-hal", "1.2", "loaded")


@pytest.mark.parametrize("setting", ["-acme", "cpu", "other", "other,-acme"])
def test_a_plugin_that_is_not_allowed_is_never_imported(
    install: Install, status: Status, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    # requirement P5
    module = install("acme")
    install("other")
    monkeypatch.setenv("HAL_PLUGINS", setting)
    assert "acme" not in {d.platform for d in hal.devices()}
    assert status("acme").status == "denied"
    assert module not in sys.modules


def test_the_context_manager_denies_too(install: Install) -> None:
    # requirement P5
    module = install("acme")
    with hal.override(plugins=["-acme"]):
        assert {d.platform for d in hal.devices()} == {"cpu"}
    assert module not in sys.modules
    assert "acme" in {d.platform for d in hal.devices()}


def test_an_allow_list_keeps_what_is_built_in(install: Install, status: Status) -> None:
    install("acme")
    install("other")
    with hal.override(plugins="acme"):
        found = {name: status(name).status for name in ("acme", "cpu", "other", "portable")}
    assert found == {"acme": "loaded", "cpu": "loaded", "other": "denied", "portable": "loaded"}


def test_one_name_from_two_distributions_is_an_error_naming_both(install: Install) -> None:
    # requirement P8
    install("acme", distribution="acme-hal")
    install("acme", distribution="acme-fork")
    with pytest.raises(PluginError, match="acme-hal") as caught:
        hal.devices()
    assert "acme-fork" in str(caught.value)
    assert "uninstall one" in str(caught.value)
    assert caught.value.plugin == "acme"


@pytest.mark.parametrize("name", ["cpu", "portable"])
@pytest.mark.parametrize("alone", [False, True], ids=["beside ours", "alone"])
def test_the_names_of_built_in_plugins_are_taken(
    install: Install, monkeypatch: pytest.MonkeyPatch, name: str, alone: bool
) -> None:
    # requirement P8
    module = install(name, distribution="intruder")
    if alone:
        theirs = [
            entry for entry in _plugins._entry_points() if entry.dist is not None and entry.dist.name == "intruder"
        ]
        monkeypatch.setattr(_plugins, "_entry_points", lambda: theirs)
    with pytest.raises(PluginError, match="intruder") as caught:
        hal.devices()
    assert f"{name!r} of intruder is reserved" in str(caught.value) or not alone
    assert "torch-hal" in str(caught.value)
    assert module not in sys.modules


def test_a_temporary_plugin_replaces_no_other(install: Install, fake_platform: Callable[..., Any]) -> None:
    # requirement P8
    install("acme")
    fake_platform("acme")
    with pytest.raises(PluginError, match="acme-hal and acme-plugin"):
        hal.devices()


def test_temporary_plugins_have_names_of_their_own(fake_platform: Callable[..., Any]) -> None:
    platform = fake_platform("acme")
    with pytest.raises(PluginError, match="'acme' is there already"), _plugins.temporary_plugin("acme", platform):
        pass


class Passing(hal.Platform):
    """A platform for the length of a block."""

    name = "passing"
    vendor = "Test"

    def probe(self, environ: Mapping[str, str]) -> hal.Probe:
        return hal.Probe((hal.Device(platform="passing", arch=self.parse_arch("p1")),))

    def parse_arch(self, text: str) -> hal.Arch:
        return hal.Arch("passing", text)

    def capabilities(self, arch: hal.Arch) -> frozenset[str]:
        return frozenset()


def test_a_temporary_plugin_is_gone_after_the_block() -> None:
    def block() -> None:
        with _plugins.temporary_plugin("passing", Passing):
            assert hal.devices("passing")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        block()
    assert "passing" not in {r.name for r in hal.plugins()}
    with pytest.raises(DeviceError, match="no platform is called 'passing'"):
        hal.devices("passing")


@pytest.mark.parametrize("setting", ["acne", "-acne", "acme,acne"])
def test_a_misspelt_plugin_is_an_error_with_the_nearest_name(
    install: Install, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    # requirement P4
    install("acme")
    monkeypatch.setenv("HAL_PLUGINS", setting)
    with pytest.raises(
        SettingError, match=r"HAL_PLUGINS names 'acne'.*Did you mean 'acme'\?.*Installed: acme, cpu"
    ) as e:
        hal.devices()
    assert e.value.setting == "HAL_PLUGINS"


def test_a_misspelt_platform_is_an_error_with_the_nearest_name(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement P4, X3
    install("acme")
    monkeypatch.setenv("HAL_PLATFORM", " ACNE ")
    with pytest.raises(SettingError, match=r"variable HAL_PLATFORM asks for platform 'acne'.*Did you mean 'acme'\?"):
        hal.devices()


def test_the_ops_cannot_be_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PLUGINS", "-portable")
    with pytest.raises(SettingError, match="use HAL_DISABLE"):
        hal.devices()


def test_a_platform_that_is_asked_for_and_denied_is_an_error_that_says_so(install: Install) -> None:
    # requirement P7
    install("acme")
    with hal.override(platform="acme", plugins="-acme"), pytest.raises(DeviceError) as caught:
        hal.device()
    assert "hal.override(platform='acme') asks for platform 'acme'" in str(caught.value)
    assert "plugin acme (acme-hal 1.2) denied" in str(caught.value)


def test_names_are_read_again_after_a_reset(install: Install, status: Status) -> None:
    assert "acme" not in {r.name for r in hal.plugins()}
    install("acme")
    assert status("acme").status == "loaded"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"members": 'name = "other"'}, "entry point 'acme' brings a platform that calls itself 'other'"),
        ({"tail": "Plugin = object()"}, "which is no subclass of hal.Platform"),
        ({"tail": "Plugin = Plugin()"}, "which is no subclass of hal.Platform"),
        ({"tail": "del Plugin"}, "has no attribute 'Plugin'"),
    ],
)
def test_an_entry_point_that_names_something_else_is_left_out(
    install: Install, status: Status, source: dict[str, str], text: str
) -> None:
    install("acme", **source)
    assert status("acme").status == "failed"
    assert text in status("acme").error


def test_entry_points_are_those_that_python_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement X9
    for folder, name, text in (
        ("first", "acme-hal", "[hal.platforms]\nacme = new:Plugin\n"),
        ("first", "plain", "[console_scripts]\nplain = plain:main\n"),
        ("second", "acme-hal", "[hal.platforms]\nacme = old:Plugin\n"),
        ("second", "plain", "[hal.platforms]\nplain = old:Plugin\n"),
    ):
        info = tmp_path / folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nName: no header\n")
        (info / "entry_points.txt").write_text(text)
    for folder in ("second", "first"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    found = {(e.name, e.value, e.dist.name if e.dist else "") for e in _plugins._entry_points()}
    python = importlib.metadata.entry_points(group=_plugins.GROUP)
    assert found == {(e.name, e.value, e.dist.name if e.dist else "") for e in python}
    assert ("acme", "new:Plugin", "acme-hal") in found
    assert not [name for name, _, _ in found if name == "plain"]
