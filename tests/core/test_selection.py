"""Selection: default deny, order, devices, steering, and the reasons of every candidate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import hal
from hal._eligibility import why_not
from hal._registry import Registry
from hal._selection import require
from hal.errors import NoKernelError, SettingError, UnknownKernelError, UnknownOpError
from hal_ops.attention import PHASES, AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest

FEATURES: dict[str, Any] = {
    "window": (127, 0),
    "softcap": 50.0,
    "sinks": True,
    "alibi": True,
    "softmax_scale": 0.5,
    "return_lse": True,
    "deterministic": True,
    "needs_grad": True,
    "graph": True,
}

BANDS = {
    "zeta": hal.Band.SPECIALIZED,
    "alpha": hal.Band.SPECIALIZED,
    "beta": hal.Band.SPECIALIZED - 1,
    "gamma": hal.Band.REFERENCE,
}


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


def reasons(selection: hal.Selection, kernel: str) -> list[hal.Reason]:
    found = [c for choice in selection.choices.values() for c in choice.candidates if c.kernel.name == kernel]
    return list(found[0].reasons)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_is_not_declared_is_refused(
    fake_platform: Any, library: Any, feature: str
) -> None:  # requirement C7, P22, R3, X5, X12
    fake_platform(kernels=library("plain"))
    selection = hal.select(request(**{feature: FEATURES[feature]}, phases=PHASES))
    for phase in PHASES:
        assert selection.kernels()[phase] != f"plain.{phase}"
        (reason,) = reasons(selection, f"plain.{phase}")
        assert reason.field == feature
        assert feature in reason.text


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_is_declared_is_admitted(
    fake_platform: Any, library: Any, feature: str
) -> None:  # requirement X5, P22
    fake_platform(kernels=library("able", fields={feature: hal.Anything()}))
    selection = hal.select(request(**{feature: FEATURES[feature]}, phases=PHASES))
    assert selection.kernels() == {p: f"able.{p}" for p in PHASES}


def test_every_feature_of_the_request_is_covered_here() -> None:  # requirement R3
    features = {n for n, rule in AttentionRequest.rules().items() if not rule.required}
    assert features - {"kv_scale", "qkv_dtype", "qkv_scale"} == set(FEATURES)


def test_fp8_inputs_are_for_kernels_that_declare_them(
    fake_platform: Any, attention_kernel: Any
) -> None:  # requirement C7, R3, X5
    formats = {"qkv_dtype": hal.OneOf("bfloat16", "float8_e4m3fn")}
    able = attention_kernel("able.prefill", fields={**formats, "qkv_scale": hal.OneOf("tensor", "head")})
    some = attention_kernel("some.prefill", fields=formats, priority=hal.Band.PLUGIN + 1)
    fake_platform(kernels=[able, some, attention_kernel("plain.prefill", priority=hal.Band.PLUGIN + 2)])
    for fields, chosen in (
        ({}, "plain"),
        ({"qkv_dtype": "float8_e4m3fn"}, "some"),
        ({"qkv_dtype": "float8_e4m3fn", "qkv_scale": "head"}, "able"),
        ({"qkv_dtype": "float8_e5m2"}, "reference"),
    ):
        selection = hal.select(request(**fields, phases="prefill"))
        assert selection.kernels() == {"prefill": f"{chosen}.prefill"}, fields
        if chosen != "plain":
            assert [r.field for r in reasons(selection, "plain.prefill")] == list(fields)


@pytest.mark.parametrize("missing", [n for n, r in AttentionRequest.rules().items() if r.required])
def test_a_kernel_must_answer_for_every_required_field(attention_kernel: Any, missing: str) -> None:  # requirement X5
    kernel = attention_kernel("forgetful.decode")
    fields = {n: c for n, c in kernel.fields.items() if n != missing}
    broken = hal.Kernel(**{**vars_of(kernel), "fields": fields})
    with pytest.raises(hal.errors.RegistrationError, match=f"must declare {missing}"):
        broken.validate(hal._plugins.registry().op("attention"))


def vars_of(kernel: hal.Kernel) -> dict[str, Any]:
    return {name: getattr(kernel, name) for name in kernel.__dataclass_fields__}


def test_the_higher_band_wins_and_names_break_ties(library: Any) -> None:  # requirement X6
    kernels = [k for name, band in BANDS.items() for k in library(name, priority=band) if k.phase == "decode"]
    for order in itertools.permutations(kernels):
        registry = Registry()
        registry.kernels = {k.name: k for k in order}
        found = [k.name for k in registry.candidates("attention", "decode")]
        assert found == ["alpha.decode", "zeta.decode", "beta.decode", "gamma.decode"]


def test_all_reasons_are_collected_not_just_the_first(
    fake_platform: Any, library: Any
) -> None:  # requirement E6, E7, R1
    fake_platform(
        kernels=library(
            "picky",
            platforms={"fake": hal.Archs(only=("f20",))},
            needs=(hal.Needs("picky-lib", ">=3.0"),),
            runtime=">=13",
            driver=">=600",
            capabilities=frozenset({"tma"}),
            fields={"head_dim": hal.OneOf(64), "dtype": hal.OneOf("float16")},
        )
    )
    found = {r.code for r in reasons(hal.select(request()), "picky.decode")}
    hardware = {"arch_not_listed", "runtime_too_old", "driver_too_old", "capability_missing"}
    assert found == hardware | {"not_installed", "head_dim", "dtype"}


def test_a_missing_library_blames_the_library_and_an_old_device_the_device(
    fake_platform: Any, library: Any
) -> None:  # requirement E7, P45
    fake_platform(
        archs=("f10",),
        kernels=library("lib", needs=(hal.Needs("some-lib"),), platforms={"fake": hal.Archs(at_least="f20")}),
    )
    installed = {"some-lib": "1.0"}
    with hal.simulate("fake:f20"):
        assert [r.code for r in reasons(hal.select(request()), "lib.decode")] == ["not_installed"]
    with hal.simulate("fake:f10", libraries=installed):
        assert [r.code for r in reasons(hal.select(request()), "lib.decode")] == ["arch_too_low"]
    with hal.simulate("fake:f10"):
        assert {r.code for r in reasons(hal.select(request()), "lib.decode")} == {"arch_too_low", "not_installed"}
    with hal.simulate("fake:f20", libraries=installed):
        assert hal.select(request()).kernels()["decode"] == "lib.decode"


@pytest.mark.parametrize(
    ("installed", "code"),
    [
        ("3.0.1", None),
        ("12.0", None),
        ("2.9", "version_too_old"),
        ("13.1", "version_too_new"),
        ("garbage", "version_unknown"),
    ],
)
def test_library_versions_are_compared_as_numbers(
    fake_platform: Any, library: Any, installed: str, code: str | None
) -> None:  # requirement E1, P21, R2
    newest = "`pip install some-lib`"
    needs = hal.Needs("some-lib", ">=3.0,<13", install=newest, because="13 renamed the function")
    fake_platform(kernels=library("lib", needs=(needs,)))
    with hal.simulate(libraries={"some-lib": installed}):
        selection = hal.select(request())
        codes = [r.code for r in reasons(selection, "lib.decode")]
    assert codes == ([] if code is None else [code])
    if code == "version_too_new":
        (reason,) = reasons(selection, "lib.decode")
        assert "13 renamed the function" in reason.text
        assert "13.1 is installed" in reason.text
        assert reason.remedy == "`pip install 'some-lib>=3.0,<13'`", "the newest would not do"


@pytest.mark.parametrize(("runtime", "admitted"), [("12.10", True), ("12.3", True), ("12.2", False), ("13", True)])
def test_runtime_versions_are_compared_as_numbers(
    fake_platform: Any, library: Any, runtime: str, admitted: bool
) -> None:  # requirement E1
    fake_platform(kernels=library("lib", runtime=">=12.3"))
    with hal.simulate(f"fake:f10,frt={runtime}"):
        found = reasons(hal.select(request()), "lib.decode")
    assert [r.code for r in found] == ([] if admitted else ["runtime_too_old"])
    if not admitted:
        assert "needs frt >=12.3; this is 12.2" in found[0].text


def test_an_unknown_runtime_version_says_so(fake_platform: Any, library: Any) -> None:  # requirement E1, X19
    fake_platform(kernels=library("lib", runtime=">=12.3"))
    with hal.simulate("fake:f10"):
        (reason,) = reasons(hal.select(request()), "lib.decode")
        (miss,) = (m for m in hal.select(request()).near_misses() if "lib.decode" in m.kernels)
    assert reason.code == "version_unknown"
    assert "not given to the simulation" in reason.text
    assert reason.remedy == "write fake:f10,frt=12.3"
    assert miss.install == (reason.remedy,)
    with hal.simulate(reason.remedy.removeprefix("write ")):
        assert hal.select(request()).kernels()["decode"] == "lib.decode"


def test_a_build_without_the_arch_is_refused(fake_platform: Any, library: Any) -> None:  # requirement P44
    fake_platform(kernels=library("lib", built_archs=lambda: frozenset({"f20", "f30"})))
    (reason,) = reasons(hal.select(request()), "lib.decode")
    assert reason.code == "build_lacks_arch"
    assert "f20, f30" in reason.text


def test_a_check_function_adds_its_reasons(fake_platform: Any, library: Any) -> None:
    def check(request: Any, device: hal.Device) -> list[hal.Reason]:
        return [hal.Reason("check", f"not on {device.name}")]

    fake_platform(kernels=library("lib", check=check))
    assert [r.text for r in reasons(hal.select(request()), "lib.decode")] == ["not on Fake 0"]


def test_limits_belong_to_a_phase(fake_platform: Any, attention_kernel: Any) -> None:  # requirement B5, D11
    fake_platform(
        kernels=[
            attention_kernel("lib.prefill", fields={"head_dim": hal.Range(1, 256), "sinks": hal.Anything()}),
            attention_kernel("lib.extend", fields={"head_dim": hal.Range(1, 128)}),
            attention_kernel("lib.decode", fields={"head_dim": hal.Range(1, 128)}),
        ]
    )
    chosen = hal.select(request(head_dim=256)).kernels()
    assert chosen["prefill"] == "lib.prefill"
    assert chosen["decode"] == "reference.decode"
    assert hal.select(request(sinks=True)).kernels()["prefill"] == "lib.prefill"


def test_more_query_tokens_than_declared_are_refused(fake_platform: Any, library: Any) -> None:  # requirement E11, B16
    fake_platform(kernels=library("single", fields={"max_q_len": hal.OneOf(1)}))
    assert hal.select(request()).kernels()["decode"] == "single.decode"
    selection = hal.select(request(max_q_len=4))
    assert [r.field for r in reasons(selection, "single.decode")] == ["max_q_len"]
    assert selection.kernels()["extend"] == "single.extend"


def test_a_non_causal_draft_is_a_declared_thing(fake_platform: Any, library: Any) -> None:  # requirement B16, X18
    fake_platform(kernels=library("causal", fields={"causal": hal.OneOf(True)}))
    selection = hal.select(request(causal=False, max_q_len=2))
    assert [r.field for r in reasons(selection, "causal.extend")] == ["causal"]


def test_kv_formats_are_exact(fake_platform: Any, library: Any) -> None:  # requirement P29, P30, P31, B7
    fake_platform(kernels=library("lib", fields={"kv_dtype": hal.OneOf("bfloat16", "float8_e4m3fn")}))
    assert hal.select(request(kv_dtype="fp8")).request.kv_dtype == "float8_e4m3fn"
    assert hal.select(request(kv_dtype="float8_e4m3fn")).kernels()["decode"] == "lib.decode"
    for other in ("float8_e4m3fnuz", "float8_e5m2"):
        (reason,) = reasons(hal.select(request(kv_dtype=other)), "lib.decode")
        assert reason.code == "dtype"
        assert other in reason.text


def test_generic_fp8_is_the_device_s_own_flavour(fake_platform: Any, library: Any) -> None:  # requirement P29
    fake_platform(devices=0)
    with hal.simulate("fake:f10,capabilities=fp8_e4m3fnuz"):
        selection = hal.select(request(kv_dtype="fp8"))
        assert selection.request.kv_dtype == "float8_e4m3fnuz"
        assert selection.receipt()["request"]["kv_dtype"] == "fp8"
    with hal.simulate("fake:f10,capabilities=bf16"):
        selection = hal.select(request(kv_dtype="fp8"))
    assert selection.kernels()["decode"] is None
    assert "this device declares none" in selection.explain()
    with pytest.raises(NoKernelError, match="name the format exactly"):
        require(selection)


def test_the_scale_is_written_into_the_request() -> None:  # requirement X12
    assert request(head_dim=64).softmax_scale == 1 / math.sqrt(64)
    assert request(head_dim=64).is_neutral("softmax_scale")
    assert not request(head_dim=64, softmax_scale=0.1).is_neutral("softmax_scale")


def test_selection_is_per_device(fake_platform: Any, library: Any) -> None:  # requirement X7, P15, X4
    fake_platform(kernels=library("new", platforms={"fake": hal.Archs(at_least="f20")}))
    with hal.simulate("fake:f10; fake:f20"):
        assert hal.select(request(), device="fake:0").kernels()["decode"] == "reference.decode"
        assert hal.select(request(), device="fake:1").kernels()["decode"] == "new.decode"
        assert hal.select(request(), device="fake:0").kernels()["decode"] == "reference.decode"


def test_equal_arch_names_of_two_vendors_are_not_mixed(fake_platform: Any, library: Any) -> None:  # requirement X4
    fake_platform("fakea", kernels=library("liba", platforms={"fakea": hal.Archs(only=("f10",))}))
    fake_platform("fakeb", kernels=library("libb", platforms={"fakeb": hal.Archs(only=("f10",))}))
    assert hal.select(request(), device="fakea:0").kernels()["decode"] == "liba.decode"
    assert hal.select(request(), device="fakeb:0").kernels()["decode"] == "libb.decode"
    assert reasons(hal.select(request(), device="fakeb:0"), "liba.decode")[0].code == "wrong_vendor"


def test_an_unknown_arch_gets_portable_kernels_and_no_other_s(
    fake_platform: Any, library: Any
) -> None:  # requirement X16, R2
    portable = library("anywhere", platforms={}, priority=hal.Band.PORTABLE)
    fake_platform(kernels=[*library("exact", platforms={"fake": hal.Archs(only=("f10", "f2*"))}), *portable])
    with hal.simulate("fake:f10; fake:f25; fake:f999"):
        chosen = [hal.select(request(), device=d).kernels()["decode"] for d in hal.devices("fake")]
    assert chosen == ["exact.decode", "exact.decode", "anywhere.decode"]


def test_adding_a_platform_changes_no_other_platform_s_choice(
    fake_platform: Any, library: Any
) -> None:  # requirement C2, P34
    fake_platform("fakea", kernels=library("liba", platforms={"fakea": hal.Archs()}))
    before = [hal.select(request(), device=d).kernels() for d in ("cpu", "fakea")]
    fake_platform("fakeb", kernels=library("libb", platforms={"fakeb": hal.Archs()}))
    assert [hal.select(request(), device=d).kernels() for d in ("cpu", "fakea")] == before


def test_loosening_an_arch_rule_only_adds_choices(fake_platform: Any, library: Any) -> None:  # requirement E13
    with hal.simulate("fakea:f10; fakea:f20; fakeb:f10; fakeb:f20"):
        fake_platform("fakea", devices=0, kernels=library("tight", platforms={"fakea": hal.Archs(only=("f20",))}))
        fake_platform("fakeb", devices=0, kernels=library("loose", platforms={"fakeb": hal.Archs(at_least="f10")}))
        tight = {
            d.arch.name
            for d in hal.devices("fakea")
            if "tight.decode" in hal.select(request(), device=d).kernels().values()
        }
        loose = {
            d.arch.name
            for d in hal.devices("fakeb")
            if "loose.decode" in hal.select(request(), device=d).kernels().values()
        }
    assert tight == {"f20"}
    assert loose == {"f10", "f20"}


def test_a_disabled_kernel_or_library_is_never_chosen(
    fake_platform: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_platform(kernels=[*library("one"), *library("two", priority=hal.Band.PERFORMANT)])
    monkeypatch.setenv("HAL_DISABLE", "one.decode, two")
    selection = hal.select(request())
    assert selection.kernels() == {"prefill": "one.prefill", "extend": "one.extend", "decode": "reference.decode"}
    assert reasons(selection, "one.decode")[0].code == "disabled_by_env"
    monkeypatch.setenv("HAL_DISABLE", "onee")
    with pytest.raises(UnknownKernelError, match=r"variable HAL_DISABLE names 'onee'.*Did you mean 'one'"):
        hal.select(request())


def test_strict_forbids_the_reference(fake_platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # requirement R5
    fake_platform()
    monkeypatch.setenv("HAL_STRICT", "1")
    with pytest.raises(NoKernelError, match="HAL_STRICT forbids the slow reference"):
        require(hal.select(request()))


def test_an_unknown_op_is_our_own_error() -> None:  # requirement X17
    with pytest.raises(UnknownOpError, match="Did you mean 'attention'"):
        hal.get_op("atention")
    with pytest.raises(UnknownOpError, match="no op is called 'rotary'"), hal.override(op_rotary="x"):
        hal.select(request())


def test_a_selection_is_plain_data(fake_platform: Any, library: Any) -> None:  # requirement P48, R1, X19
    fake_platform(kernels=library("lib", fields={"head_dim": hal.OneOf(64)}))
    selection = hal.select(request())
    data = json.loads(json.dumps(selection.as_dict()))
    refused = [c for c in data["phases"]["decode"]["candidates"] if c["status"] == "refused"]
    assert {"code": "head_dim", "field": "head_dim", "wanted": "128", "allowed": "64"}.items() <= refused[0]["reasons"][
        0
    ].items()
    assert "unknown" not in selection.explain()


def test_the_failure_shows_everything(fake_platform: Any, library: Any) -> None:  # requirement P28, R1, X19, P9
    fake_platform(kernels=library("lib", fields={"head_dim": hal.OneOf(64)}))
    with hal.override(strict=True), pytest.raises(NoKernelError) as caught:
        require(hal.select(request()))
    text = str(caught.value)
    for part in ("fake:f10", "32/8 heads", "head_dim 128; needs 64", "lib.decode", "reference.decode", "next step"):
        assert part in text
    assert caught.value.as_dict()["phases"]["decode"]["kernel"] is None
    assert caught.value.selection.device.id == "fake:0"


def test_why_not_is_empty_exactly_for_what_can_be_chosen(fake_platform: Any, library: Any) -> None:  # requirement P25
    fake_platform(kernels=library("lib"))
    selection = hal.select(request())
    for choice in selection.choices.values():
        for candidate in choice.candidates:
            no = why_not(candidate.kernel, selection.request, selection.around)
            assert (candidate.status == "refused") == bool(no)


def test_kernels_of_other_vendors_are_judged_as_of_the_decision(fake_platform: Any, library: Any) -> None:
    # requirement P25, P26
    needing = library("theirs", platforms={"elsewhere": hal.Archs()}, needs=(hal.Needs("their-library", "<2"),))
    fake_platform(kernels=[*library("lib"), *needing])
    with hal.simulate(libraries={"torch": "2.9.0", "their-library": "3.0"}):
        selection, again = hal.select(request()), hal.select(request())
        texts = [r.text for r in reasons(again, "theirs.decode")]
    assert "candidates" not in vars(selection.choices["decode"])
    assert [r.text for r in reasons(selection, "theirs.decode")] == texts
    assert texts[:2] == ["for elsewhere only; this is fake", "needs their-library <2; 3.0 is installed"]
    assert selection.receipt() == again.receipt()
    assert selection.choices == again.choices


def test_a_kernel_of_another_vendor_that_is_forced_is_refused_with_all_reasons(
    fake_platform: Any, library: Any
) -> None:
    # requirement P25
    theirs = library("theirs", platforms={"elsewhere": hal.Archs()}, needs=(hal.Needs("their-library"),))
    fake_platform(kernels=[*library("lib"), *theirs])
    with pytest.raises(NoKernelError) as caught:
        require(hal.select(request(), kernel="theirs"))
    for part in ("cannot be obeyed", "for elsewhere only; this is fake", "their-library is not installed"):
        assert part in str(caught.value)


def test_an_unknown_platform_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement P4
    monkeypatch.setenv("HAL_PLATFORM", "cpuu")
    with pytest.raises(SettingError, match="Did you mean 'cpu'"):
        hal.select(request())


def test_a_minimum_arch_that_does_not_parse_is_a_wrong_declaration(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("lib", platforms={"fake": hal.Archs(at_least="x90")}))
    (record,) = [p for p in hal.plugins() if p.name == "fake"]
    assert record.status == "failed"
    assert "'x90' is no arch of platform 'fake'" in record.error


def test_a_renamed_op_answers_to_its_old_name_and_warns(fake_platform: Any) -> None:  # requirement B12
    attention = hal._plugins.registry().op("attention")
    renamed = dataclasses.replace(attention, name="attention_two", aliases=("attention_one",))
    fake_platform(ops=lambda self: (renamed,))
    with pytest.warns(DeprecationWarning, match="'attention_one' is now called 'attention_two'"):
        assert hal._plugins.registry().op("attention_one") is renamed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hal._plugins.registry().op("attention_two") is renamed


@pytest.mark.parametrize(
    "changes", [{"platforms": {"fake": hal.Archs(only=("f99",))}}, {"needs": (hal.Needs("gone"),)}]
)
def test_graphs_are_judged_by_the_same_function_as_eager_calls(
    fake_platform: Any, library: Any, changes: dict[str, Any]
) -> None:  # requirement E5
    fake_platform(kernels=library("lib", fields={"graph": hal.OneOf(False, True)}, **changes))
    eager, graph = (reasons(hal.select(request(graph=g)), "lib.decode") for g in (False, True))
    assert eager == graph != []


def test_one_function_judges_kernels() -> None:  # requirement E5
    """No second judge: nothing else in the core reads what a kernel needs of a device or a library."""
    judged = re.compile(r"\.(platforms|needs|runtime|driver|capabilities)\b.*(satisfies|refusal|installed)\(")
    folder = Path(hal.__file__).parent
    judges = {p.name for p in folder.glob("*.py") if judged.search(p.read_text())}
    assert judges <= {"_eligibility.py"}
    assert sum("def why_not(" in p.read_text() for p in folder.rglob("*.py")) == 1


def test_the_kernels_of_one_op_are_never_judged_for_another(fake_platform: Any, library: Any) -> None:
    # requirement E10
    def check(request: Any, device: hal.Device) -> list[hal.Reason]:
        raise AssertionError("an attention kernel was asked about another op")

    fake_platform(kernels=library("lib", check=check))
    selection = hal.select(KvCacheWriteRequest(num_kv_heads=2, head_dim=64))
    names = {c.kernel.name for c in selection.choices["call"].candidates}
    assert {k.op for k in hal._plugins.registry().kernels.values() if k.name in names} == {"kv_cache_write"}
