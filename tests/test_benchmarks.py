"""The benchmark scripts run, say who did not run and why, and hold their figures against the targets."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the folder; forgotten afterwards, their names are too common."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_attention_in_small(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    cases = ["P1", "P2", "P7", "P10", "P14", "V2", "V6", "X2", "D8", "D10", "D13", "D14", "E1", "M1", "M4"]
    arguments = ["--device", "cpu", "--quick", "--only", ",".join(cases), "--json", str(file)]
    assert script("attention").main(arguments) == 1, (
        "torch's CPU kernel has no softcap and no FP8, so two cases did not run"
    )
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    rows = {row["case"].partition(" ")[0]: row for row in found["cases"]}
    assert list(rows) == cases
    for name, row in rows.items():
        for side, figures in row["sides"].items():
            assert ("us" in figures) != ("missing" in figures), (name, side)
            assert figures.get("error", 0) < 2e-2, (name, side, figures)
            assert {"of copy", "of matmul", "TB/s", "TFLOP/s", "kernel", "timed by"} <= {
                *figures
            } or "us" not in figures
    assert rows["D10"]["sides"]["torch_cpu"]["missing"] == "refused: softcap 50: torch_cpu.decode does not declare it"
    assert "flash-attn-3 is not installed" in rows["P1"]["sides"]["fa3"]["missing"]
    assert "fa3: not P1, P2, " in text
    assert "torch_cpu: not D10: refused: softcap 50" in text
    assert "OURS DID NOT RUN: P7 Llama-70B 8k e4m3, D10" in text
    assert rows["P7"]["sides"]["reference"]["error"] < 1e-2
    assert {n for n, side in rows["M4"]["sides"].items() if "us" in side} == {"torch_cpu", "reference", "contiguous"}
    assert {row["what"]: row["found"] for row in found["summary"]}["decode E1 (B64 L8192 32/8 D128), of copy"] > 0


def test_a_side_that_fails_is_reported(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention, sides = script("attention"), script("sides")
    right = attention.runs_of

    def runs_of(side: Any, inputs: Any) -> Any:
        if side.name != "reference":
            return right(side, inputs)

        def call() -> None:
            raise OSError("no such\nfile")

        return sides.Runs([call], "reference.prefill")

    monkeypatch.setattr(attention, "runs_of", runs_of)
    file = tmp_path / "out.json"
    assert attention.main(["--device", "cpu", "--quick", "--only", "P1", "--json", str(file)]) == 0
    row = json.loads(file.read_text())["cases"][0]
    assert row["sides"]["reference"] == {"missing": "failed: OSError: no such"}
    assert "reference: not P1: failed: OSError: no such" in capsys.readouterr().out


def made_up(**us: float) -> dict[str, Any]:
    return {"sides": {name: {"us": value, "of copy": 1.02} for name, value in us.items()}}


def test_targets_are_held(script: Any) -> None:
    attention = script("attention")
    rows = [
        {"case": "D1 a", **made_up(triton=10.0, fa3=11.0)},
        {"case": "D2 b", **made_up(triton=10.0, fa3=40.0)},
        {"case": "D3 c", **made_up(triton=10.0)},
        {"case": "E1 d", **made_up(triton=1.0, fa3=100.0)},
        {"case": "P13 e", **made_up(triton=90.0, fa3=60.0)},
        {"case": "P14 f", **made_up(triton=10.0)},
    ]
    found = {r["what"]: r for r in attention.summary(attention.Run(rows, "triton", {"rms_norm": 0.5}, {"ratio": 1.4}))}
    decode = found["decode D1 to D17 against fa3, geometric mean"]
    assert decode["found"] == pytest.approx((1.1 * 4.0) ** 0.5)
    assert decode["ok"] is True
    assert found["decode E1 (B64 L8192 32/8 D128), of copy"]["ok"] is True
    assert found["prefill against fa3, geometric mean"]["found"] == pytest.approx(2 / 3)
    assert found["prefill against fa3, geometric mean"]["ok"] is False
    assert found["prefill of 32k: window 1024, times faster"]["found"] == 9.0
    assert found["extend V0 (512 new on 8k, B8) against fa3"]["ok"] is None
    assert found["rms_norm 8192x8192, of copy"]["ok"] is False
    host = found["host time of a planned decode call, over a launch"]
    assert (host["at most"], host["ok"]) == (1.3, False)
    lines = [attention.summary_line(r) for r in found.values()]
    assert sum(text.endswith("MISSED") for text in lines) == 4
    assert any("not run" in text for text in lines)


def test_what_is_not_there_cannot_be_asked_for(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("attention").main(["--only", "decode,D99"])
    assert "--only D99: choose of prefill, extend, decode, latent, ops, host and P1, " in capsys.readouterr().err


def test_ops_in_small(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    ops, rows = script("ops"), script("op_rows")
    assert ops.main(["--device", "cpu", "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {row["row"].partition(" ")[0] for row in found["rows"]} == {row.op for row in rows.ROWS}
    for row in found["rows"]:
        assert row["us"]["torch"] > 0
        assert row["of copy"]["torch"] > 0
        assert "has no triton" in row["missing"]["triton"]
    assert "triton not: triton.rms_norm: " in capsys.readouterr().out
    fractions = ops.targets(script("timing").Clock("cpu", quick=True))
    assert set(fractions) == {"rms_norm", "silu_and_mul", "rotary_embedding", "kv_cache_write"}


def test_wrong_results_fail_the_run(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = script("ops")
    right = ops.factories

    def factories(row: Any, device: str, compiled: bool) -> Any:
        found = right(row, device, compiled)
        return {**found, "wrong": lambda: lambda x, w: found["torch"]()(x, w) * float("nan")}

    monkeypatch.setattr(ops, "factories", factories)
    assert ops.main(["--device", "cpu", "--quick", "--only", "rms_norm 8192x5120"]) == 1


def test_every_target_of_an_op_has_a_row(script: Any) -> None:
    names = {row.op for row in script("op_rows").ROWS}
    assert set(script("ops").TARGETS) <= names


@pytest.mark.parametrize("without", [(), ("fa3",)])
def test_the_choice_is_close_to_the_best_that_was_measured(script: Any, without: tuple[str, ...]) -> None:
    # requirement B14
    """On an H200, with and without flash-attn 3, over the cases of the grid."""
    choices = script("choices")
    results = json.loads((FOLDER / "results" / "attention_grid_h200.json").read_text())
    found = list(choices.compare(results, without))
    assert len(found) >= 40
    assert [row.case for row in found if row.ratio is None] == []
    assert [row for row in found if row.ratio < 0.7] == []
    assert choices.geometric_mean(found) > 0.95
