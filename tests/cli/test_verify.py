"""``hal verify`` and ``hal tune``: what they pass on, what they print, and their exit codes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import hal
from hal._ledger import Row
from hal._measurements import Measurement
from hal_ops.attention import AttentionRequest

CORNER = {"head_dim": 64, "sinks": True, "alibi": False}


@pytest.fixture
def verify(monkeypatch) -> Any:
    """Stand in for ``hal.testing.verify``; ``calls`` keeps what it was called with, ``rows`` is what it answers."""
    stub = types.SimpleNamespace(calls=[], rows=[])

    def run(*, op: Any, kernels: Any, device: Any, progress: Any, quick: bool = False, requests: Any = ()) -> list[Row]:
        progress("decode 1 of 2")
        stub.calls.append((op, kernels, device, quick, requests))
        return stub.rows

    monkeypatch.setattr(hal.testing, "verify", run, raising=False)
    return stub


@pytest.fixture
def tune(monkeypatch) -> Any:
    """Stand in for ``hal._tune``."""
    stub = types.ModuleType("hal._tune")
    vars(stub).update(calls=[], rows=[])

    def run(request: Any, *, device: Any, progress: Any) -> list[Measurement]:
        progress("reference.decode")
        vars(stub)["calls"].append((request, device))
        rows: list[Measurement] = vars(stub)["rows"]
        return rows

    vars(stub)["tune"] = run
    monkeypatch.setitem(sys.modules, "hal._tune", stub)
    monkeypatch.setattr(hal, "_tune", stub, raising=False)
    return stub


def test_verify_passes_its_options_on(hal_cli, verify) -> None:
    verify.rows = [Row("reference.decode", {}, CORNER, "verified")]
    args = (
        "--op",
        "attention",
        "--kernel",
        "reference",
        "--kernel",
        "torch_cpu.decode",
        "--device",
        "cpu:0",
        "--quick",
    )
    result = hal_cli("verify", *args)
    assert result.exit_code == 0
    assert verify.calls == [("attention", ("reference", "torch_cpu.decode"), "cpu:0", True, ())]
    assert result.stderr == "decode 1 of 2\n"


def test_verify_counts_and_names_failures(hal_cli, hal_json, verify) -> None:
    failed = Row("reference.decode", {}, CORNER, "failed", "off by 3.0 at [0, 1]", "2026-01-02")
    verify.rows = [Row("reference.decode", {}, {**CORNER, "head_dim": 80}, "verified"), failed]
    result = hal_cli("verify")
    assert result.exit_code == 1
    assert ["reference.decode", "1", "1"] in [line.split() for line in result.stdout.splitlines()]
    assert "failed: reference.decode (head_dim 64, sinks True): off by 3.0 at [0, 1]" in result.stdout
    facts = hal_json("verify", code=1)
    assert (facts["verified"], facts["failed"]) == (1, 1)
    assert set(facts["rows"][0]) == {"kernel", "status", "corner", "key", "detail", "date"}


def test_verify_that_ran_nothing_is_a_no(hal_cli, verify) -> None:
    result = hal_cli("verify", "--kernel", "reference")
    assert result.exit_code == 1
    assert "nothing was run" in result.stdout
    assert "`hal doctor`" in result.stdout


def test_verify_for_one_request_leaves_nothing_open(hal_cli, verify, llama_options) -> None:
    verify.rows = [Row("reference.decode", {}, CORNER, "verified")]
    args = ("verify", "--device", "cpu:0", "attention", *llama_options, "--kernel", "torch_cpu")
    assert hal_cli(*args).exit_code == 0
    [(op, kernels, device, quick, (request,))] = verify.calls
    assert (op, kernels, device, quick) == ("attention", ("torch_cpu",), "cpu:0", False)
    assert (request.num_q_heads, request.kv_layout) == (32, "NHD")
    assert isinstance(request.page_size, int)


def test_verify_for_the_requests_of_a_model(hal_cli, verify) -> None:
    verify.rows = [Row("reference.decode", {}, CORNER, "verified")]
    assert hal_cli("verify", "--model", "gpt-oss-120b", "--device", "cpu").exit_code == 0
    [(op, _, _, _, requests)] = verify.calls
    assert op == "attention"
    assert {(r.num_q_heads, r.sinks, r.window, r.kv_dtype) for r in requests} == {
        (64, True, window, kv) for window in ((127, 0), (None, None)) for kv in ("bfloat16", "float8_e4m3fn")
    }
    wrong = hal_cli("verify", "--model", "GPT-OSS-120B", "--quick")
    assert wrong.exit_code == 2
    assert "leave out --quick" in wrong.stderr


def test_what_is_verified_for_a_request_is_verified_for_it(hal_cli, monkeypatch) -> None:
    """The corners of a declaration have few heads; a row about a model's own heads is another one."""
    heads = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
    options = [text for name, value in heads.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setenv("HAL_VERIFY", "require")
    request = AttentionRequest(**heads, phases=("decode",))
    assert hal.select(request, device="cpu").kernels()["decode"] == "reference.decode"
    result = hal_cli("verify", "attention", *options, "--kernel", "torch_cpu.decode", "--device", "cpu")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert hal.select(request, device="cpu").kernels()["decode"] == "torch_cpu.decode"


def test_an_op_as_the_value_of_an_option_is_no_command(hal_cli, verify) -> None:
    verify.rows = [Row("reference.decode", {}, CORNER, "verified")]
    hal_cli("verify", "--op", "attention")
    assert verify.calls == [("attention", (), None, False, ())]


def test_verify_and_tune_without_torch_say_so(hal_cli, verify, tune, monkeypatch, llama_options) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for args in (["verify"], ["tune", "attention", *llama_options]):
        result = hal_cli(*args)
        assert result.exit_code == 1
        assert "`pip install torch`" in result.stderr
    assert verify.calls == []
    assert vars(tune)["calls"] == []


def test_tune_prints_times_best_first_and_what_is_chosen_now(hal_cli, hal_json, tune, llama_options) -> None:
    args = ("tune", "attention", *llama_options, "--window", "128", "--device", "cpu:0")
    vars(tune)["rows"] = [
        Measurement("reference.decode", {}, "x", 90.25, 2.0),
        Measurement("torch_cpu.decode", {}, "x", 30.0, 1.0),
    ]
    result = hal_cli(*args)
    assert result.exit_code == 0
    [(request, device)] = vars(tune)["calls"]
    assert (request.window, request.num_q_heads, device) == ((127, 0), 32, "cpu:0")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1:3] == [["torch_cpu.decode", "30.0", "1.0"], ["reference.decode", "90.2", "2.0"]]
    assert "decode: torch_cpu.decode is chosen, as declared" in result.stdout
    facts = hal_json(*args)
    assert set(facts) == {"op", "measurements", "kernels"}
    assert facts["measurements"][0]["microseconds"] == 90.25


def test_tune_with_nothing_to_compare_says_so(hal_cli, tune, llama_options) -> None:
    result = hal_cli("tune", "attention", *llama_options)
    assert result.exit_code == 0
    assert "nothing was measured" in result.stdout
