"""What is said to be known of a kernel, and to be copied by it: on this arch, and for what is asked."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import RegistrationError
from hal_ops.attention import ATTENTION, AttentionRequest

ON = {"sinks": hal.OneOf(False, True), "window": hal.Windows(), "kv_dtype": hal.OneOf("bfloat16", "float8_e4m3fn")}


def request(**changes: Any) -> AttentionRequest:
    fields = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "phases": ("decode",)}
    return AttentionRequest(**{**fields, **changes})


def chosen(selection: hal.Selection) -> Any:
    return selection.choices["decode"].candidates[0]


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({}, "run"),
        ({"window": 128}, "run"),
        ({"sinks": True}, "emulated"),
        ({"kv_dtype": "float8_e4m3fn"}, "claimed"),
        ({"kv_dtype": "float8_e4m3fn", "sinks": True}, "claimed"),
    ],
)
def test_the_weaker_word_counts(fake_platform: Any, attention_kernel: Any, asked: dict[str, Any], word: str) -> None:
    less = {"sinks": "emulated", "kv_dtype": "claimed"}
    kernel = attention_kernel("lib.decode", fields=ON, evidence={"f10": "run"}, evidence_with=less)
    fake_platform(kernels=[kernel])
    selection = hal.select(request(**asked))
    assert chosen(selection).evidence == word
    assert f"chosen    {word}" in selection.explain()


def test_a_stronger_word_for_a_feature_adds_nothing(fake_platform: Any, attention_kernel: Any) -> None:
    kernel = attention_kernel("lib.decode", fields=ON, evidence={"f10": "compiled"}, evidence_with={"sinks": "run"})
    fake_platform(kernels=[kernel])
    assert chosen(hal.select(request(sinks=True))).evidence == "compiled"


def test_a_field_that_the_phase_does_not_look_at_says_nothing(attention_kernel: Any) -> None:
    kernel = attention_kernel("lib.prefill", evidence={"*": "run"}, evidence_with={"kv_dtype": "claimed"})
    asked = request(kv_dtype="float8_e4m3fn", phases=("prefill", "decode"))
    assert kernel.evidence_for("f10", asked) == "run"


def test_copies_are_told_where_they_are_made(fake_platform: Any, attention_kernel: Any) -> None:  # requirement B4
    more = {"sinks": "sinks, into bfloat16", "kv_dtype": "q, into FP8"}
    fake_platform(kernels=[attention_kernel("lib.decode", fields=ON, copies="q, where cut", copies_with=more)])
    told = {text: hal.select(request(**asked)) for text, asked in ASKED.items()}
    for text, selection in told.items():
        assert chosen(selection).notes == (f"copies {text}",)
        assert selection.explain().count("copies ") == 1


ASKED: dict[str, dict[str, Any]] = {
    "q, where cut": {},
    "sinks, into bfloat16; q, where cut": {"sinks": True},
    "sinks, into bfloat16; q, into FP8; q, where cut": {"sinks": True, "kv_dtype": "float8_e4m3fn"},
}


def test_a_request_without_them_shows_no_copies(fake_platform: Any, attention_kernel: Any) -> None:
    fake_platform(kernels=[attention_kernel("lib.decode", fields=ON, copies_with={"sinks": "sinks, into bfloat16"})])
    assert chosen(hal.select(request())).notes == ()


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"platforms": {"fake": hal.Archs(only=("f2*",))}, "evidence": {"f10": "run"}}, "evidence for f10, which"),
        ({"evidence": {"f10": "ran"}}, "'ran' is not one of run, emulated, compiled, claimed"),
        ({"evidence_with": {"sinks": "maybe"}}, "'maybe' is not one of"),
        ({"evidence_with": {"sink": "run"}}, "'sink', which is no field that turns a feature on"),
        ({"evidence_with": {"head_dim": "run"}}, "'head_dim', which is no field that turns a feature on"),
        ({"copies_with": {"page_size": "q"}}, "'page_size', which is no field that turns a feature on"),
    ],
)
def test_wrong_declarations_are_refused(attention_kernel: Any, declared: dict[str, Any], text: str) -> None:
    with pytest.raises(RegistrationError, match=text):
        attention_kernel("lib.decode", **declared).validate(ATTENTION)


@pytest.mark.parametrize("arch", ["f10", "sm_90"])
def test_evidence_below_the_least_arch_is_refused(fake_platform: Any, attention_kernel: Any, arch: str) -> None:
    platforms = {"fake": hal.Archs(at_least="f20")}
    fake_platform(kernels=[attention_kernel("lib.decode", platforms=platforms, evidence={arch: "run", "f20": "run"})])
    (record,) = [p for p in _plugins.plugins() if p.name == "fake"]
    assert record.status == "failed"
    assert f"evidence for {arch}, which its platforms do not admit" in record.error


@pytest.mark.parametrize("kernel", _plugins.registry().kernels.values(), ids=lambda k: k.name)
def test_a_note_does_not_deny_what_the_declaration_says(kernel: hal.Kernel) -> None:
    assert "run" not in kernel.note.split(), "say it in evidence or evidence_with"
