"""``hal lock`` and ``hal diff``."""

from __future__ import annotations

from pathlib import Path

import pytest

import hal
from hal._lock import read_lock
from hal.cli._models import MODELS, requests_for


@pytest.fixture
def locked(hal_json, tmp_path: Path) -> Path:
    file = tmp_path / "hal.lock"
    hal_json("lock", str(file), "--device", "cpu")
    return file


def test_locks_every_model(hal_cli, hal_json, tmp_path: Path) -> None:
    file = tmp_path / "hal.lock"
    facts = hal_json("lock", str(file))
    wanted = {
        r.digest() for m in MODELS for requests in requests_for(m, hal.device()).values() for r in requests.values()
    }
    attends = [row for row in read_lock(file) if row["op"] != "kv_cache_write"]
    assert {row["request_digest"] for row in attends} == wanted
    assert len({row["request_digest"] for row in facts["decisions"]}) == len(facts["decisions"])
    assert facts["refused"] == []
    assert f"HAL_LOCK={file}" in hal_cli("lock", str(file)).stdout


def test_cache_writes_are_locked_too(hal_json, locked: Path, tmp_path: Path, llama_options) -> None:
    own = tmp_path / "own.lock"
    hal_json("explain", "attention", *llama_options, "--device", "cpu", "--lock", str(own))
    pages = next(r["fields"]["page_size"] for r in read_lock(own) if r["op"] == "attention")
    for file in (locked, own):
        assert (8, 128, 128, pages) in writes(file)
    assert any(dims[:3] == (1, 512, 64) for dims in writes(locked))  # DeepSeek's latents


def writes(file: Path) -> list[tuple[int, ...]]:
    names = ("num_kv_heads", "head_dim", "v_head_dim", "page_size")
    return [tuple(r["request"][n] for n in names) for r in read_lock(file) if r["op"] == "kv_cache_write"]


def test_a_locked_decision_is_repeated(hal_cli, hal_json, locked: Path, monkeypatch, llama_options) -> None:
    monkeypatch.setenv("HAL_LOCK", str(locked))
    facts = hal_json("explain", "attention", *llama_options, "--device", "cpu")
    assert facts["phases"]["decode"]["forced_by"] == f"lock file {locked}"
    assert hal_cli("lock", str(locked), "--device", "cpu").exit_code == 0


def test_a_lock_file_that_cannot_be_read_is_an_error(hal_cli, monkeypatch, tmp_path: Path, llama_options) -> None:
    monkeypatch.setenv("HAL_LOCK", str(tmp_path / "absent"))
    result = hal_cli("explain", "attention", *llama_options)
    assert result.exit_code == 1
    assert "absent" in result.stderr
    assert hal_cli("lock", str(tmp_path / "absent")).exit_code == 0


def test_what_cannot_be_served_is_named_and_the_rest_is_written(hal_cli, hal_json, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAL_ATTENTION_DECODE", "torch_cpu.decode")
    monkeypatch.setenv("HAL_DISABLE", "torch_cpu")
    file = tmp_path / "hal.lock"
    facts = hal_json("lock", str(file), "--device", "cpu", code=1)
    # MiniLM and DeepSeek's prompts, which do not decode, and its latents in two formats, which another op attends to.
    ops = ["attention", "attention", "kv_cache_write", "kv_cache_write", "mla_attention", "mla_attention"]
    assert sorted(row["op"] for row in facts["decisions"]) == ops
    assert any("Llama-3-8B" in text and "decode" in text for text in facts["refused"])
    assert "Llama-3-8B" in hal_cli("lock", str(file), "--device", "cpu").stdout


def test_diff(hal_cli, hal_json, locked: Path, tmp_path: Path, monkeypatch) -> None:
    assert hal_json("diff", str(locked), str(locked))["differences"] == []
    assert hal_cli("diff", str(locked), str(locked)).stdout == "the same decisions\n"
    monkeypatch.setenv("HAL_DISABLE", "torch_cpu")
    other = tmp_path / "other.lock"
    hal_cli("lock", str(other), "--device", "cpu")
    result = hal_cli("diff", str(locked), str(other))
    assert result.exit_code == 1
    assert "torch_cpu.decode -> " in result.stdout
    assert hal_json("diff", str(locked), str(other), code=1)["differences"] == result.stdout.splitlines()


def test_diff_of_a_file_that_is_none(hal_cli, locked: Path, tmp_path: Path) -> None:
    assert hal_cli("diff", str(locked), str(tmp_path / "absent")).exit_code == 2
    wrong = tmp_path / "wrong.lock"
    wrong.write_text("[]")
    result = hal_cli("diff", str(locked), str(wrong))
    assert result.exit_code == 1
    assert str(wrong) in result.stderr
