"""``hal env``."""

from __future__ import annotations

from pathlib import Path

from hal._settings import SETTINGS


def test_lists_every_setting_with_its_source(hal_cli, hal_json, monkeypatch) -> None:
    monkeypatch.setenv("HAL_STRICT", "1")
    rows = {row["name"]: row for row in hal_json("env")["settings"]}
    assert set(rows) == {setting.name for setting in SETTINGS}
    assert rows["HAL_STRICT"] == {
        **rows["HAL_STRICT"],
        "value": True,
        "source": "variable HAL_STRICT",
        "default": False,
    }
    assert rows["HAL_VERIFY"]["source"] == "default"
    assert all(set(row) == {"name", "value", "source", "default", "help", "values"} for row in rows.values())
    text = hal_cli("env").stdout
    assert all(setting.name in text and setting.help in text for setting in SETTINGS)


def test_values_from_a_config_file_and_from_a_forced_op(hal_json, monkeypatch, tmp_path: Path) -> None:
    # requirement X2
    config = tmp_path / "hal.toml"
    config.write_text('disable = ["triton"]\nlog = "info"\n')
    monkeypatch.setenv("HAL_CONFIG", str(config))
    monkeypatch.setenv("HAL_LOG", " Error ")
    monkeypatch.setenv("HAL_OP_RMS_NORM", "reference")
    rows = {row["name"]: row for row in hal_json("env")["settings"]}
    assert (rows["HAL_DISABLE"]["value"], rows["HAL_DISABLE"]["source"]) == (["triton"], f"config file {config}")
    assert (rows["HAL_LOG"]["value"], rows["HAL_LOG"]["source"]) == ("error", "variable HAL_LOG")
    assert rows["HAL_OP_RMS_NORM"]["value"] == "reference"


def test_unknown_names_and_values_are_shown_with_the_table_and_exit_1(hal_cli, hal_json, monkeypatch) -> None:
    # requirement X3, P20, R4
    monkeypatch.setenv("HAL_ATENTION", "fa3")
    monkeypatch.setenv("HAL_VERIFY", "requird")
    monkeypatch.setenv("HAL_STRICT", "1")
    result = hal_cli("env")
    assert result.exit_code == 1
    top, table = result.stdout.split("\n\n", 1)
    assert "HAL_ATENTION" in top
    assert "'HAL_ATTENTION'" in top
    assert "'require'" in top
    assert "variable HAL_STRICT" in table
    facts = hal_json("env", code=1)
    assert len(facts["errors"]) == 2
    assert len(facts["settings"]) == len(SETTINGS)


WRONG_NAMES = {
    "HAL_OP_RMS_NORM": ("torch.rms_nrm", "Did you mean 'torch.rms_norm'"),
    "HAL_OP_RMS_NRM": ("torch", "Did you mean 'rms_norm'"),
    "HAL_ATTENTION": ("torch_cpy", "Did you mean 'torch_cpu'"),
    "HAL_ATTENTION_DECODE": ("torch_cpu.prefill", "it is a kernel of prefill"),
    "HAL_DISABLE": ("triton, tritn", "Did you mean 'triton'"),
}


def test_names_that_nothing_has_are_wrong_values(hal_cli, hal_json, monkeypatch, tmp_path: Path) -> None:
    # requirement X3
    for name, (value, _) in WRONG_NAMES.items():
        monkeypatch.setenv(name, value)
    for facts in (hal_json("env", code=1)["errors"], hal_json("doctor", "--device", "cpu", code=1)["problems"]):
        for name, (_, near) in WRONG_NAMES.items():
            assert any(f"variable {name}" in text and near in text for text in facts), name
    assert hal_cli("env").stdout.count("wrong: ") == len(WRONG_NAMES)
    for name in WRONG_NAMES:
        monkeypatch.delenv(name)
    config = tmp_path / "hal.toml"
    config.write_text('op_rms_norm = "torch.rms_nrm"\nattention = "torch_cpu"\n')
    monkeypatch.setenv("HAL_CONFIG", str(config))
    (error,) = hal_json("env", code=1)["errors"]
    assert f"config file {config} asks for 'torch.rms_nrm'" in error


def test_a_damaged_config_file_is_shown_too(hal_cli, monkeypatch, tmp_path: Path) -> None:
    config = tmp_path / "hal.toml"
    config.write_text("strict = ")
    monkeypatch.setenv("HAL_CONFIG", str(config))
    result = hal_cli("env")
    assert result.exit_code == 1
    assert str(config) in result.stdout
    assert "HAL_STRICT" in result.stdout
