"""Errata: known-bad combinations, as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hal
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
    ],
)
def test_a_wrong_file_says_which_row(with_rows: Any, rows: list[Any], text: str) -> None:
    with_rows(*rows)
    with pytest.raises(RegistrationError) as caught:
        hal.select(request())
    assert text in str(caught.value)


def test_a_missing_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAL_ERRATA", str(tmp_path / "none.json"))
    with pytest.raises(RegistrationError, match="cannot be read"):
        hal.select(request())
