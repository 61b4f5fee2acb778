"""Errata: known-bad combinations, as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins
from hal._errata_check import checked_errata
from hal.errors import RegistrationError
from hal_ops.attention import AttentionRequest

ROW = {
    "id": "lib-1",
    "kernels": ["lib.*"],
    "library": "some-lib",
    "versions": ">=0.6.7,<0.6.15",
    "summary": "short pages come out wrong",
    "url": "https://example.org/issues/1",
}


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64, **changes})


@pytest.fixture
def with_rows(fake_platform: Any, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    fake_platform(kernels=library("lib", needs=(hal.Needs("some-lib"),)))

    def write(*rows: dict[str, Any]) -> None:
        path = tmp_path / "errata.json"
        path.write_text(json.dumps(rows))
        monkeypatch.setenv("HAL_ERRATA", str(path))

    return write


def refusal(version: str = "0.6.13", **changes: Any) -> hal.Reason | None:
    with hal.simulate(libraries={"some-lib": version}):
        candidates = hal.select(request(**changes)).choices["decode"].candidates
    found = next(c.reasons for c in candidates if c.kernel.name == "lib.decode")
    return found[0] if found else None


def test_a_known_bad_version_is_refused_with_the_link(with_rows: Any) -> None:  # requirement D13
    with_rows(ROW)
    reason = refusal()
    assert reason is not None
    assert reason.code == "version_known_bad"
    for part in ("short pages come out wrong", "some-lib >=0.6.7,<0.6.15", "lib-1", "https://example.org/issues/1"):
        assert part in str(reason)


@pytest.mark.parametrize("version", ["0.6.6", "0.6.15", "0.10.0"])
def test_other_versions_are_not(with_rows: Any, version: str) -> None:  # requirement D13, E1
    with_rows(ROW)
    assert refusal(version) is None


@pytest.mark.parametrize(
    ("when", "bad", "good"),
    [
        ({"page_size": {"max": 15}}, 8, 16),
        ({"page_size": [16, 32]}, 32, 64),
        ({"page_size": {"multiple_of": 64}}, 128, 16),
        ({"page_size": {"min": 128}}, 128, 64),
    ],
)
def test_a_row_may_depend_on_the_request(with_rows: Any, when: dict[str, Any], bad: int, good: int) -> None:
    with_rows({**ROW, "when": when})
    if bad in (16, 32, 64, 128):
        assert refusal(page_size=bad) is not None
    assert refusal(page_size=good) is None


def test_a_row_may_depend_on_the_device(with_rows: Any) -> None:
    with_rows({**ROW, "platform": "fake", "archs": ["f2*"]})
    assert refusal() is None
    with hal.simulate("fake:f20"):
        assert refusal() is not None


def test_slow_is_shown_and_not_refused(with_rows: Any) -> None:
    with_rows({**ROW, "severity": "slow", "summary": "no pipelining"})
    with hal.simulate(libraries={"some-lib": "0.6.13"}):
        selection = hal.select(request())
    assert selection.kernels()["decode"] == "lib.decode"
    assert "known to be slow: no pipelining [lib-1]" in selection.explain()


def test_an_edited_file_is_read_again(with_rows: Any) -> None:
    with_rows(ROW)
    assert refusal() is not None
    with_rows({**ROW, "versions": "<0.1"})
    hal.reset()
    assert refusal() is None


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{**ROW, "kernel": "x"}], "row 0: unknown key 'kernel'. Did you mean 'kernels'"),
        ([{"id": "x"}], "row 0: lacks kernels, summary, url"),
        ([{**ROW, "severity": "bad"}], "severity must be one of wrong, crash, slow"),
        ([{**ROW, "when": {"page_size": {"maximum": 3}}}], "when.page_size: give a list"),
        ([ROW, {**ROW, "summary": "other"}], "two errata have the id 'lib-1'"),
        (["x"], "row 0: must be an object"),
        ([{**ROW, "when": {"page_sise": [8]}}], "no op's request has a field 'page_sise'. Did you mean 'page_size'"),
        ([{**ROW, "kernels": "lib.*"}], "row 0: kernels='lib.*' must be a list of names or patterns"),
        ([ROW, {**ROW, "archs": "f10"}], "row 1: archs='f10' must be a list of names"),
        ([{**ROW, "url": 7}], "row 0: url=7 must be a text"),
        ([{**ROW, "versions": "2.13"}], "row 0: versions='2.13' is no specifier: write '==2.13' or '<2.13'"),
        ([{**ROW, "versions": "=2.13"}], "erratum 'lib-1': versions: '=2.13' is not a version specifier"),
        ([{**ROW, "library": ""}], "says nothing without a library"),
        ([{**ROW, "when": ["window"]}], "row 0: when=['window'] must be an object"),
        ([{**ROW, "when": {"page_size": []}}], "when.page_size: give a list"),
        ([{**ROW, "when": {"page_size": {"min": "64"}}}], "when.page_size: min='64' must be a number"),
        ([{**ROW, "when": {"page_size": {"min": 9, "max": 8}}}], "min=9 is above max=8"),
        ([{**ROW, "when": {"page_size": {"multiple_of": 0}}}], "multiple_of=0 must be a whole number of at least 1"),
        ([{**ROW, "when": {"dtype": {"min": 1}}}], "'lib-1': when.dtype: it holds no numbers, such as 'bfloat16'"),
        ([{**ROW, "when": {"dtype": ["bf17"]}}], "'lib-1': when.dtype: unknown dtype 'bf17'; did you mean 'bf16'"),
        ([{**ROW, "when": {"kv_dtype": ["fp8"]}}], "when.kv_dtype: 'fp8' is made exact before a kernel is judged"),
        ([{**ROW, "when": {"kv_layout": ["nhd"]}}], "when.kv_layout: kv_layout='nhd': choose 'NHD'"),
        ([{**ROW, "when": {"head_dim": ["64"]}}], "when.head_dim: head_dim='64': give a whole number"),
        ([{**ROW, "when": {"sinks": [1]}}], "when.sinks: sinks=1: give True or False"),
        ([{**ROW, "when": {"window": [[1, 2, 3]]}}], "when.window: window=(1, 2, 3): give None, an int"),
        ([{**ROW, "when": {"group_size": ["7"]}}], "when.group_size: '7' is none of its values"),
        ([{**ROW, "when": {"hidden_size": [64]}}], "when.hidden_size: no request of attention has that field"),
    ],
)
def test_a_wrong_file_says_which_row(with_rows: Any, rows: list[Any], text: str) -> None:
    with_rows(*rows)
    with pytest.raises(RegistrationError) as caught:
        hal.select(request())
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": ["lib.*", "libb.decode"]}, "no kernel here matches 'libb.decode'. Did you mean 'lib.decode'?"),
        ({"kernels": ["torch_cpu"]}, "no kernel here matches 'torch_cpu'. Did you mean 'torch_cpu.*'?"),
        ({"platform": "cpuu"}, "no platform is called 'cpuu'. Did you mean 'cpu'?"),
        ({"library": "torchh"}, "no kernel here looks for a library called 'torchh'. Did you mean 'torch'?"),
        ({"platform": "fake", "archs": ["x86_64"]}, "'x86_64' is no arch of platform 'fake': write f and a number"),
        ({"archs": ["x86_6A"]}, "no arch is called 'x86_6A'. Did you mean 'x86_64'?"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(with_rows: Any, change: dict[str, Any], text: str) -> None:
    # requirement X3, P4
    with_rows({**ROW, **change})
    with pytest.raises(RegistrationError, match=r"errata\.json: erratum 'lib-1': ") as caught:
        hal.select(request())
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"platform": "acme"}, {"library": "acme-attention"}, {"library": "some-lib2"}, {"archs": ["acme2"]}]
)
def test_a_name_unlike_all_may_be_of_a_plugin_that_is_elsewhere(with_rows: Any, change: dict[str, Any]) -> None:
    with_rows({**ROW, **change})
    assert refusal() is None


@pytest.mark.parametrize(
    ("when", "bad", "good"),
    [
        ({"window": [[127, 0]]}, {"window": 128}, {"window": 64}),
        ({"window": [128]}, {"window": (127, 0)}, {}),
        ({"window": [[127, None]]}, {"window": 128}, {}),
        ({"window": [None]}, {}, {"window": 128}),
        ({"dtype": ["bf16", "fp32"]}, {"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"num_kv_heads": [14]}, {"num_kv_heads": 14}, {}),
        ({"group_size": [7]}, {}, {"num_kv_heads": 14}),
        ({"softcap": [30]}, {"softcap": 30.0}, {"softcap": 20.0}),
        ({"kv_scale": ["head"]}, {"kv_scale": "head", "kv_dtype": "float8_e4m3fn"}, {"kv_dtype": "float8_e4m3fn"}),
    ],
)
def test_values_are_compared_as_requests_hold_them(
    with_rows: Any, when: dict[str, Any], bad: dict[str, Any], good: dict[str, Any]
) -> None:
    with_rows({**ROW, "when": when})
    for changes, refused in ((bad, True), (good, False)):
        with hal.simulate(libraries={"some-lib": "0.6.13"}):
            candidates = hal.select(request(**changes)).choices["decode"].candidates
        codes = {r.code for c in candidates for r in c.reasons if c.kernel.name == "lib.decode"}
        assert ("version_known_bad" in codes) is refused


def test_an_arch_may_be_spelt_as_its_platform_lets_it(with_rows: Any) -> None:
    row = {**ROW, "kernels": ["torch_cpu.*"], "library": "", "versions": ""}
    for change in ({"archs": ["x86-64"]}, {"archs": ["AMD64"], "platform": "cpu"}):
        with_rows({**row, **change})
        hal.reset()
        with hal.simulate("cpu:x86_64", libraries={"torch": "2.9.0"}):
            assert hal.select(request()).kernels()["decode"] != "torch_cpu.decode"


def test_a_row_in_python_is_held_to_its_types_too() -> None:
    with pytest.raises(RegistrationError, match=r"kernels='lib\.\*' must be a list"):
        hal.Erratum(**{**ROW, "kernels": "lib.*"})


@pytest.mark.parametrize("platform", ["nvidia", "rocm", "musa"])
def test_what_our_platforms_ship_is_about_kernels_that_there_are(platform: str) -> None:
    registry = _plugins.registry()
    if platform not in registry.platforms:
        pytest.skip(f"torch-hal-{platform} is not installed")
    rows = tuple(registry.platforms[platform].errata())
    assert checked_errata(rows, platform, registry) == rows


def test_a_missing_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAL_ERRATA", str(tmp_path / "none.json"))
    with pytest.raises(RegistrationError, match="cannot be read"):
        hal.select(request())
