"""Settings: where a value comes from, and what a wrong one says."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

import hal
from hal import _settings
from hal.errors import SettingError


def test_defaults_without_any_source() -> None:
    settings = _settings.current()
    assert settings["tune"] == "use"
    assert settings.value("tune").source == "default"
    assert settings["disable"] == ()


def test_values_are_trimmed_and_case_folded(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement X3
    monkeypatch.setenv("HAL_ATTENTION", "  Torch_CPU \n")
    monkeypatch.setenv("HAL_VERIFY", "REQUIRE")
    settings = _settings.current()
    assert settings["attention"] == "torch_cpu"
    assert settings["verify"] == "require"


def test_unset_and_empty_are_one(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement P43
    monkeypatch.setenv("HAL_STRICT", "")
    assert _settings.current().value("strict") == _settings.Value(False, "default")
    monkeypatch.setenv("HAL_STRICT", "0")
    assert _settings.current().value("strict") == _settings.Value(False, "variable HAL_STRICT")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("HAL_ATENTION", "Did you mean 'HAL_ATTENTION'"),
        ("HAL_PLUGIN", "Did you mean 'HAL_PLUGINS'"),
        ("HAL_OP_", "HAL_OP_<NAME>"),
        ("HAL_KERNEL", "HAL_ATTENTION forces a kernel for attention, HAL_OP_<NAME> for another op"),
        ("HAL_ATTENTION_BACKEND", "Did you mean 'HAL_ATTENTION'"),
        ("HAL_ATTENTION_PREFILL_KERNEL", "Did you mean 'HAL_ATTENTION_PREFILL'"),
        ("HAL_DISABLE_KERNELS", "Did you mean 'HAL_DISABLE'"),
    ],
)
def test_an_unknown_variable_is_an_error_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:  # requirement P20, R4
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingError, match=near) as caught:
        _settings.current()
    assert name in str(caught.value)
    assert caught.value.setting == name


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("HAL_VERIFY", "requre", "Did you mean 'require'"),
        ("HAL_STRICT", "maybe", "give 1 or 0"),
        ("HAL_LOG", "loud", "debug, info, warning, error"),
        ("HAL_ATTENTION", "fa3,fa4", "give one name"),
        ("HAL_CONFIG", "/nowhere/hal.toml", "no such file"),
    ],
)
def test_an_unknown_value_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:  # requirement X3, P43
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=text) as caught:
        _settings.current()
    assert name in str(caught.value)
    assert value in str(caught.value)


def test_a_removed_variable_says_what_replaced_it(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement P20
    monkeypatch.setitem(_settings.REMOVED, "HAL_BACKEND", "set HAL_ATTENTION")
    monkeypatch.setenv("HAL_BACKEND", "fa3")
    with pytest.raises(SettingError, match="was removed: set HAL_ATTENTION"):
        _settings.current()


def write_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hal.toml"
    path.write_text(text)
    monkeypatch.setenv("HAL_CONFIG", str(path))
    return path


def test_precedence_of_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # requirement X2, P43
    path = write_config(monkeypatch, tmp_path, 'attention = "one"\nstrict = true\ndisable = ["a", "b"]\n')
    settings = _settings.current()
    assert settings.value("attention") == _settings.Value("one", f"config file {path}")
    assert settings["strict"] is True
    assert settings["disable"] == ("a", "b")
    monkeypatch.setenv("HAL_ATTENTION", "two")
    assert _settings.current().value("attention") == _settings.Value("two", "variable HAL_ATTENTION")
    with hal.override(attention="three"):
        assert _settings.current()["attention"] == "three"
        assert "hal.override" in _settings.current().value("attention").source


@pytest.mark.parametrize("name", [s.name for s in _settings.SETTINGS if s.name not in ("HAL_CONFIG",)])
def test_every_setting_can_come_from_each_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:  # requirement P43
    setting = next(s for s in _settings.SETTINGS if s.name == name)
    text = {"HAL_LOG": "debug", "HAL_TUNE": "off", "HAL_VERIFY": "require"}.get(name, "1")
    monkeypatch.setenv(name, text)
    assert _settings.current().value(setting.key).source == f"variable {name}"
    monkeypatch.delenv(name)
    write_config(monkeypatch, tmp_path, f'{setting.key} = "{text}"\n')
    assert _settings.current().value(setting.key).source.startswith("config file")
    with hal.override(**{setting.key: text}):
        assert _settings.current().value(setting.key).source.startswith("hal.override")
    assert setting.help
    assert setting.values


def test_a_config_key_that_is_unknown_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_config(monkeypatch, tmp_path, 'atention = "fa3"\n')
    with pytest.raises(SettingError, match="Did you mean 'attention'"):
        _settings.current()


def test_a_damaged_config_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_config(monkeypatch, tmp_path, "attention = \n")
    with pytest.raises(SettingError, match="cannot be read"):
        _settings.current()


def test_a_config_file_in_another_encoding_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_config(monkeypatch, tmp_path, "")
    path.write_bytes('attention = "größer"\n'.encode("utf-16"))
    with pytest.raises(SettingError, match=r"hal\.toml cannot be read: 'utf-8' codec"):
        _settings.current()


def test_an_edited_config_file_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_config(monkeypatch, tmp_path, 'attention = "one"\n')
    assert _settings.current()["attention"] == "one"
    path.write_text('attention = "another"\n')
    assert _settings.current()["attention"] == "another"


def test_override_restores_the_outer_value_on_exceptions_and_nesting() -> None:  # requirement C8
    with hal.override(attention="outer"):
        with contextlib.suppress(RuntimeError), hal.override(attention="inner", strict=True):
            assert _settings.current()["attention"] == "inner"
            raise RuntimeError
        assert _settings.current()["attention"] == "outer"
        assert _settings.current()["strict"] is False
    assert _settings.current()["attention"] is None


def test_override_belongs_to_its_thread() -> None:  # requirement C8
    seen: list[object] = []
    with hal.override(attention="mine"):
        thread = threading.Thread(target=lambda: seen.append(_settings.current()["attention"]))
        thread.start()
        thread.join()
    assert seen == [None]


def test_override_checks_its_keys_and_values() -> None:
    with pytest.raises(SettingError, match="Did you mean 'attention'"), hal.override(attentoin="fa3"):
        pass
    with pytest.raises(SettingError, match="give one of off, require"), hal.override(verify="yes"):
        pass


def test_override_with_none_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_ATTENTION", "fa3")
    with hal.override(attention=None):
        assert _settings.current()["attention"] is None


@pytest.mark.parametrize(
    ("name", "meant"), [("HAL_PLUGIN", "HAL_PLUGINS"), ("HAL_STRCT", "HAL_STRICT"), ("HAL_KERNL", "")]
)
def test_what_all_variables_begin_with_makes_none_the_nearest(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement X3
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingError) as caught:
        _settings.current()
    assert (f"Did you mean '{meant}'" if meant else "") in str(caught.value)
    assert ("Did you mean" in str(caught.value)) is bool(meant)
    assert "`hal env` lists every variable" in str(caught.value)
