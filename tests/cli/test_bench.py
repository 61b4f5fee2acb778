"""``hal bench``: real times on the CPU, as a table and as data; which requests are timed; what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

SMALL = ["attention", "--num-q-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--device", "cpu"]


def test_a_table_a_phase_with_ratios_and_rates(hal_cli) -> None:
    result = hal_cli("bench", *SMALL, "--repeats", "4", "--kernel", "reference", "--kernel", "torch_cpu")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][0] == "cpu:0"
    assert "torch" in lines[0]
    assert "attention: 4/2 heads, head_dim 16, bfloat16" in result.stdout
    for phase in ("prefill", "extend", "decode"):
        rows = [line for line in lines if line[:1] in ([f"torch_cpu.{phase}"], [f"reference.{phase}"])]
        assert rows[0][3] == "1.00"
        assert float(rows[1][3]) >= 1
        assert all(len(row) == 8 and row[-2:] == ["not", "verified"] for row in rows)
    assert "sample 4/4" in result.stderr


def test_json_names_the_machine_the_driver_and_the_libraries(hal_json) -> None:
    facts = hal_json("bench", *SMALL, "--repeats", "4", "--phases", "prefill")
    assert set(facts) == {"date", "device", "versions", "libraries", "results"}
    assert facts["device"]["driver"]
    assert facts["versions"]["torch"] == facts["libraries"]["torch"]
    (row,) = facts["results"]
    assert (row["name"], row["kernel"], row["ratio"]) == ("attention", "torch_cpu.prefill", 1.0)
    assert row["tflops"] > 0
    assert row["identity"]["driver"] == facts["device"]["driver"]
    assert row["request"]["phases"] == ["prefill"]


def test_an_op_whose_work_nobody_counts_has_times_alone(hal_cli) -> None:
    result = hal_cli("bench", "rms_norm", "--hidden-size", "64", "--repeats", "4", "--device", "cpu")
    assert "TFLOP/s" not in result.stdout
    assert "torch.rms_norm" in result.stdout


def test_models_by_name_in_any_case(hal_cli) -> None:
    result = hal_cli("bench", "--model", "minilm-l6", "--repeats", "4", "--device", "cpu")
    assert result.exit_code == 0
    assert "MiniLM-L6: 12/12 heads" in result.stdout
    wrong = hal_cli("bench", "--model", "Llama-99")
    assert wrong.exit_code == 2
    assert "no model called 'Llama-99' is known" in wrong.stderr
    assert "Llama-3-8B, Llama-3-70B" in wrong.stderr


def test_without_an_op_every_models_requests_are_timed_once(hal_cli, monkeypatch) -> None:
    asked: list[Any] = []

    def bench(request: Any, **options: Any) -> list[Any]:
        asked.append(request)
        return []

    monkeypatch.setattr("hal._bench.bench", bench)
    result = hal_cli("bench", "--device", "cpu")
    assert len(asked) == len(set(asked)) > 8
    assert "Llama-3-70B bfloat16, Qwen3-32B bfloat16" in result.stdout
    assert "GPT-OSS-120B sliding fp8" in result.stdout
    assert "`hal explain` says why" in result.stdout


def test_a_simulated_device_cannot_be_timed(hal_cli, monkeypatch) -> None:
    monkeypatch.setenv("HAL_DEVICES", "rocm:gfx942,hip=6.4")
    result = hal_cli("bench", *SMALL[:-2])
    assert result.exit_code == 1
    assert "is simulated" in result.stderr
