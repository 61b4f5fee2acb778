"""Receipts, lock files, diffs, and the agreement of ranks."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal.errors import LockError, RankMismatchError
from hal_ops.attention import AttentionRequest


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


@pytest.fixture
def two(fake_platform: Any, library: Any) -> None:
    fake_platform(
        kernels=[
            *library("best", needs=(hal.Needs("best-lib"),), fields={"page_size": hal.OneOf(16, 128)}),
            *library("other", priority=hal.Band.PERFORMANT, fields={"page_size": hal.OneOf(64)}),
        ]
    )


BEST = {"best-lib": "1.0", "torch": "2.13.0"}


def test_a_receipt_names_what_the_decision_depends_on(two: None) -> None:
    with hal.simulate(libraries=BEST):
        receipt = hal.select(request()).receipt()
    assert receipt["kernels"]["decode"]["kernel"] == "best.decode"
    assert receipt["kernels"]["decode"]["versions"]["best-lib"] == "1.0"
    assert receipt["kernels"]["decode"]["versions"]["arch"] == "f10"
    assert receipt["fields"] == {"page_size": 16, "kv_layout": "NHD"}
    assert pickle.loads(pickle.dumps(receipt)) == json.loads(json.dumps(receipt)) == receipt


def test_equal_decisions_have_equal_digests(two: None) -> None:  # requirement R9
    with hal.simulate(libraries=BEST):
        one, same = hal.select(request()).receipt(), hal.select(request()).receipt()
    with hal.simulate(libraries={}):
        other = hal.select(request()).receipt()
    assert one["digest"] == same["digest"] != other["digest"]
    assert one["reasons_digest"] != other["reasons_digest"]


def test_a_lock_repeats_the_decision(two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hal.lock"
    with hal.simulate(libraries=BEST):
        hal.write_lock(path, [hal.select(request(), kernel="other").receipt()])
        monkeypatch.setenv("HAL_LOCK", str(path))
        selection = hal.select(request())
    assert selection.kernels()["decode"] == "other.decode"
    assert selection.request.page_size == 64
    assert f"lock file {path}" in selection.explain()


def test_a_request_that_is_not_locked_is_decided_afresh_and_says_so(
    two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hal.lock"
    hal.write_lock(path, [hal.select(request()).receipt()])
    monkeypatch.setenv("HAL_LOCK", str(path))
    assert "holds no decision for this request" in hal.select(request(sinks=True)).explain()


def test_a_changed_library_breaks_the_lock(two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hal.lock"
    with hal.simulate(libraries=BEST):
        hal.write_lock(path, [hal.select(request()).receipt()])
    monkeypatch.setenv("HAL_LOCK", str(path))
    with hal.simulate(libraries={**BEST, "best-lib": "1.1"}), pytest.raises(LockError) as caught:
        hal.select(request())
    assert "decode: best-lib was 1.0, is 1.1" in caught.value.differences
    assert "unset HAL_LOCK" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "must hold an object with a format"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "its decisions must be a list"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_lock_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    path = tmp_path / "hal.lock"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("HAL_LOCK", str(path))
    with pytest.raises(LockError, match=message):
        hal.select(request())


def test_a_diff_names_what_changed(two: None, tmp_path: Path) -> None:
    with hal.simulate(libraries=BEST):
        hal.write_lock(tmp_path / "a", [hal.select(request()).receipt(), hal.select(request(softcap=1.0)).receipt()])
        hal.write_lock(tmp_path / "b", [hal.select(request(), kernel="other").receipt()])
    lines = hal.diff_locks(tmp_path / "a", tmp_path / "b")
    assert any("decode: best.decode -> other.decode" in line for line in lines)
    assert any("page_size: 16 -> 64" in line for line in lines)
    assert any("only in" in line for line in lines)
    assert hal.diff_locks(tmp_path / "a", tmp_path / "a") == []


def test_ranks_that_agree_pass(two: None) -> None:  # requirement R9
    mine = [hal.select(request()).receipt()]
    hal.assert_same_decisions(mine, lambda mine: [mine, copy.deepcopy(mine), copy.deepcopy(mine)])


def test_ranks_that_differ_fail_with_the_difference(two: None) -> None:  # requirement R9
    with hal.simulate(libraries=BEST):
        mine = hal.select(request()).receipt()
    with hal.simulate(libraries={}):
        theirs = hal.select(request()).receipt()
    with pytest.raises(RankMismatchError) as caught:
        hal.assert_same_decisions([mine], lambda mine: [mine, [theirs]])
    assert "rank 1 against rank 0: decode: best.decode -> other.decode" in caught.value.differences
    with pytest.raises(RankMismatchError, match="was decided on rank 0 only"):
        hal.assert_same_decisions([mine], lambda mine: [mine, []])


def test_no_decision_of_a_rank_hides_another(two: None) -> None:  # requirement R9
    """Decisions for two kinds of device, and two for one request of which one was forced, are all compared."""
    with hal.simulate("fake:f10;fake:f20", libraries=BEST):
        one, two_ = (hal.select(request(), device=f"fake:{i}").receipt() for i in (0, 1))
        forced = hal.select(request(), device="fake:0", kernel="other").receipt()
        forced_there = hal.select(request(), device="fake:1", kernel="other").receipt()
    for mine, theirs, text in (
        ([one, two_], [forced, two_], "rank 1 against rank 0: decode: best.decode -> other.decode"),
        ([two_, one], [two_, forced], "rank 1 against rank 0: decode: best.decode -> other.decode"),
        ([two_, one], [forced_there, one], "rank 1 against rank 0: decode: best.decode -> other.decode"),
        ([one, forced], [one], "rank 1: only rank 0 decided other.prefill, other.extend, other.decode for fake:f10 "),
        ([forced], [one, forced], "rank 1: rank 0 did not decide best.prefill, best.extend, best.decode for fake:f10 "),
    ):
        with pytest.raises(RankMismatchError) as caught:
            hal.assert_same_decisions(mine, lambda mine, theirs=theirs: [mine, theirs])  # type: ignore[misc]
        assert any(line.startswith(text) for line in caught.value.differences), caught.value.differences
        hal.assert_same_decisions(mine, lambda mine: [mine, [*reversed(mine), *mine]])


def test_two_decisions_for_one_request_are_not_written(two: None, tmp_path: Path) -> None:
    with hal.simulate(libraries=BEST):
        auto, forced = hal.select(request()).receipt(), hal.select(request(), kernel="other").receipt()
        again = hal.select(request(), kernel="best").receipt()
    with pytest.raises(
        LockError, match=r"not written: there are two decisions for fake:f10 attention num_q_heads=32"
    ) as caught:
        hal.write_lock(tmp_path / "hal.lock", [auto, forced])
    assert "decode: best.decode -> other.decode" in caught.value.differences
    assert not (tmp_path / "hal.lock").exists()
    hal.write_lock(tmp_path / "hal.lock", [auto, again, auto])
    assert len(json.loads((tmp_path / "hal.lock").read_text())["decisions"]) == 1


def with_lock(path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]) -> str:
    """What selecting says of a lock file of one decision, after a change of that."""
    with hal.simulate(libraries=BEST):
        row = hal.select(request()).receipt()
        path.write_text(json.dumps({"format": 1, "decisions": change(row)}))
        monkeypatch.setenv("HAL_LOCK", str(path))
        with pytest.raises(LockError) as caught:
            hal.select(request())
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("decisions", "text"),
    [
        (lambda row: {"a": 1}, "its decisions must be a list"),
        (lambda row: [1], "decision 0 must be an object, and is 1"),
        (lambda row: [{}], "decision 0 lacks op, request_digest, platform"),
        (
            lambda row: [row, {k: v for k, v in row.items() if k != "kernels"}],
            "decision 1 (fake:f10 attention) lacks kernels",
        ),
        (lambda row: [{**row, "fields": [1]}], "decision 0 (fake:f10 attention) has fields [1]: it must be an object"),
        (lambda row: [{**row, "arch": 9}], "decision 0 has arch 9: it must be a text"),
        (lambda row: [{**row, "kernels": {"decode": "best.decode"}}], "does not name the kernel for decode"),
        (lambda row: [{**row, "kernels": {"decode": {"kernel": "x.y"}}}], "does not say the versions for decode"),
        (lambda row: [row, {**row, "digest": "0"}], "there are two decisions for fake:f10 attention"),
    ],
)
def test_a_damaged_decision_is_named(
    two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decisions: Any, text: str
) -> None:
    assert text in with_lock(tmp_path / "hal.lock", monkeypatch, decisions)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"fields": {"page_size": 16, "kv_layout": "NHD", "softcap": 3.0}},
            "it sets softcap, which the request does not",
        ),
        (
            {"fields": {"page_size": 16, "kv_layout": "NHD", "nope": 1}},
            "it sets nope, which the request does not leave open",
        ),
        ({"fields": {"page_size": 16}}, "it does not say kv_layout, which the request leaves open"),
        ({"fields": {"page_size": "auto", "kv_layout": "NHD"}}, "it does not say page_size"),
        ({"fields": {"page_size": "many", "kv_layout": "NHD"}}, "page_size='many': give a whole number"),
        ({"kernels": {}}, "it has no kernel for prefill"),
    ],
)
def test_a_decision_locks_what_the_request_leaves_open_and_all_its_phases(
    two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], text: str
) -> None:
    said = with_lock(tmp_path / "hal.lock", monkeypatch, lambda row: [{**row, **change}])
    assert text in said
    assert "of the decision for fake:f10 attention num_q_heads=32" in said


def test_a_decision_that_lacks_one_phase_is_damaged(two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_decode(row: dict[str, Any]) -> list[Any]:
        return [{**row, "kernels": {p: k for p, k in row["kernels"].items() if p != "decode"}}]

    assert "it has no kernel for decode" in with_lock(tmp_path / "hal.lock", monkeypatch, without_decode)
