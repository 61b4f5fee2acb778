"""What a plugin may not do: the core checks, whatever the plugin would like."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import NoKernelError, UnknownKernelError
from hal_ops.attention import AttentionRequest

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]
Fake = Callable[..., Any]
Declare = Callable[..., hal.Kernel]

PLAIN: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64, "phases": ("prefill",)}


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**PLAIN, **fields})


def test_a_kernel_that_declares_nothing_is_refused_with_its_plugin(install: Install, status: Status) -> None:
    # requirement P27, X5
    kernel = "hal.Kernel(name='rude.prefill', op='attention', phase='prefill', target='x:y', priority=499, fields={})"
    install("rude", members=f"def kernels(self): return [{kernel}]")
    text = status("rude").error
    assert "kernel 'rude.prefill' of op 'attention' is declared wrongly" in text
    assert "it must declare num_q_heads, num_kv_heads, head_dim, v_head_dim, dtype, causal" in text
    assert "rude.prefill" not in _plugins.registry().kernels


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"softcap": 30.0}, "feature_unsupported"),
        ({"window": 16}, "feature_unsupported"),
        ({"sinks": True}, "feature_unsupported"),
        ({"alibi": True}, "feature_unsupported"),
        ({"softmax_scale": 0.5}, "feature_unsupported"),
        ({"return_lse": True}, "feature_unsupported"),
        ({"needs_grad": True}, "feature_unsupported"),
        ({"deterministic": True}, "feature_unsupported"),
        ({"graph": True}, "feature_unsupported"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_what_a_kernel_does_not_declare_it_is_not_given(
    fake_platform: Fake, attention_kernel: Declare, fields: dict[str, Any], code: str
) -> None:
    # requirement P27, P22, X5
    fake_platform("fake", kernels=[attention_kernel("rude.prefill", priority=499)])
    assert hal.select(request(), device="fake").kernels() == {"prefill": "rude.prefill"}
    choice = hal.select(request(**fields), device="fake").choices["prefill"]
    (rude,) = [c for c in choice.candidates if c.kernel.name == "rude.prefill"]
    assert [r.code for r in rude.reasons] == [code]
    assert [r.field for r in rude.reasons] == list(fields)


def test_a_forced_choice_is_not_outbid(fake_platform: Fake, attention_kernel: Declare) -> None:
    # requirement P27
    rude, polite = attention_kernel("rude.prefill", priority=499), attention_kernel("polite.prefill", priority=400)
    fake_platform("fake", kernels=[rude, polite])
    for force in ({"kernel": "polite"}, {"kernel": {"prefill": "polite.prefill"}}):
        assert hal.select(request(), device="fake", **force).kernels() == {"prefill": "polite.prefill"}
    with hal.override(attention="reference"):
        assert hal.select(request(), device="fake").kernels() == {"prefill": "reference.prefill"}


def test_a_forced_choice_that_cannot_serve_is_not_replaced(fake_platform: Fake, attention_kernel: Declare) -> None:
    # requirement P27, P26
    able = attention_kernel("able.prefill", priority=499, fields={"softcap": hal.Range(0)})
    fake_platform("fake", kernels=[able, attention_kernel("polite.prefill")])
    selection = hal.select(request(softcap=30.0), device="fake", kernel="polite")
    assert selection.kernels() == {"prefill": None}
    with pytest.raises(NoKernelError, match="softcap"):
        hal.get_attention(**PLAIN, softcap=30.0, device="fake", kernel="polite")


def test_a_kernel_does_not_answer_to_another_name(fake_platform: Fake, attention_kernel: Declare) -> None:
    # requirement P27
    fake_platform("fake", kernels=[attention_kernel("rude.prefill", priority=499)])
    with pytest.raises(UnknownKernelError, match="polite"):
        hal.select(request(), device="fake", kernel="polite")


RUDE_KERNEL = """
class Rude(hal.Kernel):
    def answers_to(self, name): return True
    def validate(self, op): pass
    def evidence_for(self, device): return "run"
"""


def test_a_kernel_that_judges_itself_is_not_taken(install: Install, status: Status) -> None:
    # requirement P27
    made = "Rude(name='rude.prefill', op='attention', phase='prefill', target='x:y', priority=499, fields={})"
    install("rude", head=RUDE_KERNEL, members=f"def kernels(self): return [{made}]")
    assert "no subclass, since the core alone judges" in status("rude").error


def test_the_plugin_band_is_for_others(install: Install, status: Status, kernel_source: str) -> None:
    members = "def kernels(self): return [kernel(self.name + '.prefill')]"
    install("ours", distribution="torch-hal-nvidia", head=kernel_source, members=members)
    install("theirs", distribution="torch-hal-theirs", head=kernel_source, members=members)
    assert "the PLUGIN band is for others' distributions" in status("ours").error
    assert status("theirs").status == "loaded"


@pytest.mark.parametrize("taken", ["alpha.prefill", "reference.prefill"])
def test_a_kernel_name_has_one_owner_and_the_error_names_both(
    install: Install, status: Status, kernel_source: str, taken: str
) -> None:
    install("alpha", head=kernel_source, members="def kernels(self): return [kernel('alpha.prefill')]", version="3.1")
    install("zeta", head=kernel_source, members=f"def kernels(self): return [kernel({taken!r})]", version="0.9")
    owner = "alpha (alpha-hal 3.1)" if taken == "alpha.prefill" else "portable (torch-hal"
    assert f"kernel {taken!r} of zeta (zeta-hal 0.9) is registered by {owner}" in status("zeta").error
    assert status("alpha").status == "loaded"


def test_an_op_name_has_one_owner(install: Install, status: Status) -> None:
    members = "def ops(self):\n    from hal_ops.attention import ATTENTION\n    return [ATTENTION]"
    install("rude", members=members)
    assert "op 'attention' is registered by portable (torch-hal" in status("rude").error


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("check", lambda request, device: 1 / 0, "ZeroDivisionError"),
        ("check", lambda request, device: sys.exit(7), "SystemExit: 7"),
        ("check", lambda request, device: ["no"], "TypeError: it gave 'no', and not a hal.Reason"),
        ("check", lambda request, device: None, "TypeError"),
        ("built_archs", lambda: 1 / 0, "ZeroDivisionError"),
        ("built_archs", lambda: sys.exit(7), "SystemExit: 7"),
        ("built_archs", lambda: 5, "TypeError"),
    ],
)
def test_broken_code_of_a_declaration_refuses_its_kernel_alone(
    fake_platform: Fake, attention_kernel: Declare, name: str, code: Any, text: str
) -> None:
    # requirement P41, P44, X19
    rude = attention_kernel("rude.prefill", priority=499, **{name: code})
    fake_platform("fake", kernels=[rude, attention_kernel("polite.prefill")])
    choice = hal.select(request(), device="fake").choices["prefill"]
    assert choice.kernel is not None
    assert choice.kernel.name == "polite.prefill"
    (reason,) = next(c.reasons for c in choice.candidates if c.kernel.name == "rude.prefill")
    assert reason.code == "plugin_failed"
    assert f"{name}() of rude.prefill failed: {text}" in reason.text


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (lambda request, device: lambda q, k, v, **kw: q, "could swallow an argument"),
        (lambda request, device: lambda q, k, v: q, "no keyword 'cu_seqlens_q'"),
        (lambda request, device: None, "None is not a callable object"),
        (lambda request, device: 1 / 0, "ZeroDivisionError"),
        (lambda request, device: sys.exit(7), "SystemExit: 7"),
    ],
)
def test_code_that_does_not_keep_the_contract_is_not_bound(
    fake_platform: Fake,
    attention_kernel: Declare,
    kernel_module: Callable[..., str],
    factory: Any,
    text: str,
) -> None:
    # requirement A4, P24, P25
    pytest.importorskip("torch")
    target = f"{kernel_module(factory=factory)}:factory"
    fake_platform("fake", kernels=[attention_kernel("rude.prefill", target=target)])
    with pytest.raises(NoKernelError, match=text):
        hal.get_attention(**PLAIN, device="fake", kernel="rude")
    assert hal.get_attention(**PLAIN, device="fake").kernels() == {"prefill": "reference.prefill"}
