"""Forced choices: validated, obeyed or refused, never replaced; and what may force them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

import hal
from hal._selection import PRECEDENCE, require, select_together
from hal.errors import NoKernelError, UnknownKernelError, UnknownOpError
from hal_ops.attention import PHASES, AttentionRequest


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


@pytest.fixture
def two(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=[*library("best"), *library("other", priority=hal.Band.PERFORMANT)])


def chosen(**how: Any) -> dict[str, str | None]:
    return hal.select(request(), **how).kernels()


def test_a_library_forces_all_its_phases(two: None) -> None:
    assert chosen(kernel="other") == {p: f"other.{p}" for p in PHASES}


def test_a_kernel_forces_its_own_phase(two: None) -> None:
    assert chosen(kernel="other.decode") == {
        "prefill": "best.prefill",
        "extend": "best.extend",
        "decode": "other.decode",
    }


def test_a_mapping_forces_phase_by_phase(two: None) -> None:  # requirement D10
    found = chosen(kernel={"prefill": "other", "decode": "reference.decode"})
    assert found == {"prefill": "other.prefill", "extend": "best.extend", "decode": "reference.decode"}


@pytest.mark.parametrize("how", ["argument", "context", "variable", "config"])
def test_a_forced_kernel_that_cannot_serve_is_refused_with_all_reasons(
    fake_platform: Any, library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:  # requirement B1, P26, P28, X1, R1
    limited = library("limited", fields={"head_dim": hal.OneOf(64)}, platforms={"fake": hal.Archs(only=("f20",))})
    fake_platform(kernels=[*library("best"), *limited])
    argument = {"kernel": "limited"} if how == "argument" else {}
    if how == "variable":
        monkeypatch.setenv("HAL_ATTENTION", "limited")
    if how == "config":
        (tmp_path / "hal.toml").write_text('attention = "limited"')
        monkeypatch.setenv("HAL_CONFIG", str(tmp_path / "hal.toml"))
    with hal.override(**({"attention": "limited"} if how == "context" else {})):
        selection = hal.select(request(), **argument)
        with pytest.raises(NoKernelError) as caught:
            require(selection)
        with pytest.raises(NoKernelError, match="cannot be obeyed"):
            hal.get_attention(num_q_heads=32, num_kv_heads=8, head_dim=128, **argument)
    text = str(caught.value)
    source = {
        "argument": "argument kernel=",
        "context": "hal.override(",
        "variable": "variable HAL_ATTENTION",
        "config": "config file",
    }
    assert text.startswith(source[how])
    assert "head_dim 128; needs 64" in text
    assert "needs f20; this is f10" in text
    assert "without it the choice would be prefill best.prefill" in text


def test_precedence_is_fixed(
    fake_platform: Any, library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # requirement X2, C1
    """Each layer is switched on from the weakest up, and takes over from the last."""
    names = ["bands", "config", "variable", "lock", "context", "argument"]
    bands = {n: hal.Band.SPECIALIZED if n == "bands" else hal.Band.PORTABLE for n in names}
    fake_platform(kernels=[k for n in names for k in library(n, priority=bands[n])])
    decided = [chosen()["decode"]]
    (tmp_path / "hal.toml").write_text('attention = "config"')
    monkeypatch.setenv("HAL_CONFIG", str(tmp_path / "hal.toml"))
    decided.append(chosen()["decode"])
    monkeypatch.setenv("HAL_ATTENTION", "variable")
    decided.append(chosen()["decode"])
    hal.write_lock(tmp_path / "hal.lock", [hal.select(request(), kernel="lock").receipt()])
    monkeypatch.setenv("HAL_LOCK", str(tmp_path / "hal.lock"))
    decided.append(chosen()["decode"])
    with hal.override(attention="context"):
        decided.append(chosen()["decode"])
        decided.append(chosen(kernel="argument")["decode"])
    assert decided == [f"{n}.decode" for n in names]


def test_precedence_is_printed(two: None) -> None:  # requirement X2
    text = hal.select(request(), kernel="other").explain()
    assert " > ".join(PRECEDENCE) in text
    assert "argument kernel='other'" in text


def test_the_variable_of_a_phase_is_nearer_than_that_of_the_op(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_ATTENTION", "other")
    monkeypatch.setenv("HAL_ATTENTION_DECODE", "reference")
    assert chosen() == {"prefill": "other.prefill", "extend": "other.extend", "decode": "reference.decode"}
    with hal.override(attention="best"):
        assert chosen() == {p: f"best.{p}" for p in PHASES}


def test_the_general_variable_of_an_op_works_for_any_op(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_OP_MERGE_ATTENTION_STATES", "reference")
    op = hal.get_op("merge_attention_states", num_heads=2, v_head_dim=8, dtype="float32", device="cpu")
    assert op.selection.kernels() == {"call": "reference.merge_attention_states"}
    monkeypatch.setenv("HAL_OP_ATTENTION", "other")
    assert chosen()["decode"] == "other.decode"


def test_a_setting_about_no_op_says_where_it_stands(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement X3
    """Whoever asks for another op did not write that name."""
    monkeypatch.setenv("HAL_OP_RMSNORM", "triton")
    with pytest.raises(UnknownOpError, match=r"^variable HAL_OP_RMSNORM: no op .* Did you mean 'rms_norm'") as caught:
        chosen()
    assert caught.value.name == "rmsnorm"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("othr", "Did you mean 'other'"),
        ("other.decod", "Did you mean 'other.decode'"),
        ("torch.kv_cache_write", "it serves kv_cache_write"),
    ],
)
def test_a_wrong_name_is_an_error(
    two: None, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:  # requirement X1, X3, P4
    monkeypatch.setenv("HAL_ATTENTION", name)
    with pytest.raises(UnknownKernelError, match=text) as caught:
        chosen()
    assert "HAL_ATTENTION" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flash_attn_3", "Did you mean 'fa3', of flash-attn-3?"),
        ("flashinfer-python", "'flashinfer_fa3'"),
        ("flash-attn", "Did you mean 'fa2'"),
        ("fa33", "Did you mean 'fa3'?"),
    ],
)
def test_a_library_may_be_called_as_its_distribution_is(name: str, text: str) -> None:  # requirement X1, X19
    """As other engines and package registries call them: the text says what it is called here."""
    with pytest.raises(UnknownKernelError) as caught:
        hal.get_attention(num_q_heads=4, num_kv_heads=2, head_dim=64, device="cpu", kernel=name)
    assert text in str(caught.value)
    with hal.override(disable=[name]), pytest.raises(UnknownKernelError) as caught:
        hal.select(AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64), device="cpu")
    assert text in str(caught.value)


def test_a_library_of_other_ops_names_its_kin() -> None:  # requirement X1
    with pytest.raises(UnknownKernelError, match=r"it serves .*Did you mean .*'flashinfer_fa3'.* of flashinfer-python"):
        hal.get_attention(num_q_heads=4, num_kv_heads=2, head_dim=64, device="cpu", kernel="FLASHINFER")


def test_a_kernel_of_another_phase_is_an_error(two: None, monkeypatch: pytest.MonkeyPatch) -> None:  # requirement X1
    monkeypatch.setenv("HAL_ATTENTION_PREFILL", "other.decode")
    with pytest.raises(UnknownKernelError, match="it is a kernel of decode"):
        chosen()


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("other.decode", "asks for 'other.decode', a kernel of decode; the request has only prefill"),
        ({"decode": "other"}, "asks for 'other' in the decode phase; the request has only prefill"),
        ({"prefill": "best", "decode": "other.decode"}, "asks for 'other.decode' in the decode phase"),
    ],
)
def test_an_argument_about_a_phase_that_is_not_asked_for_is_refused(
    two: None, kernel: Any, text: str
) -> None:  # requirement B1, P26
    with pytest.raises(UnknownKernelError, match=re.escape(text)):
        hal.select(request(phases="prefill"), kernel=kernel)
    with pytest.raises(UnknownKernelError, match=r"ask for decode too \(phases=\)"):
        hal.get_attention(num_q_heads=32, num_kv_heads=8, head_dim=128, phases="prefill", kernel=kernel)


def test_a_setting_about_a_phase_that_is_not_asked_for_is_for_other_calls(
    two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_ATTENTION_DECODE", "other")
    with hal.override(attention_extend="other.extend"):
        assert hal.select(request(phases="prefill")).kernels() == {"prefill": "best.prefill"}


def test_an_argument_speaks_to_layers_that_have_the_phase(two: None) -> None:
    layers = [request(phases="prefill"), request()]
    prompts, steps = select_together(layers, kernel={"decode": "other"})
    assert prompts.kernels() == {"prefill": "best.prefill"}
    assert steps.kernels()["decode"] == "other.decode"


def test_nothing_replaces_a_forced_kernel_that_fails_to_import(
    fake_platform: Any, library: Any
) -> None:  # requirement P26, P42, R16
    fake_platform(kernels=[*library("best"), *library("broken", target="no_such_module_at_all:prefill")])
    with pytest.raises(NoKernelError, match=r"asks for broken\.prefill, and it cannot be used.*missing module"):
        hal.get_attention(num_q_heads=2, num_kv_heads=1, head_dim=8, dtype="float32", kernel="broken")


def test_forcing_works_alike_for_every_combination_of_sources(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strongest source wins whatever the weaker ones say."""
    for variable, context, argument in itertools.product((None, "best", "other"), repeat=3):
        monkeypatch.delenv("HAL_ATTENTION", raising=False)
        if variable:
            monkeypatch.setenv("HAL_ATTENTION", variable)
        with hal.override(**({"attention": context} if context else {})):
            expected = argument or context or variable or "best"
            assert chosen(kernel=argument)["decode"] == f"{expected}.decode"
