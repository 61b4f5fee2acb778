"""Receipts, lock files, diffs, and the agreement of ranks."""

from __future__ import annotations

import copy
import json
import pickle
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
    ("text", "message"), [("{", "is damaged"), ('{"format": 99}', "format 99"), (None, "cannot be read")]
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
    key = mine["request_digest"]
    with pytest.raises(RankMismatchError) as caught:
        hal.assert_same_decisions([mine], lambda mine: [mine, {key: theirs}])
    assert "rank 1 against rank 0: decode: best.decode -> other.decode" in caught.value.differences
    with pytest.raises(RankMismatchError, match="was decided on rank 0 only"):
        hal.assert_same_decisions([mine], lambda mine: [mine, {}])
