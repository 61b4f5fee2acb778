"""The figures in ``benchmarks/results`` can be read, and what their notes name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_results_are_json(path: Path) -> None:
    """By the standard: Python's NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        pytest.fail(f"{path.name} holds {word}")

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.name)
def test_notes_name_results_that_are_there(path: Path) -> None:
    named = set(re.findall(r"[\w.-]+\.json\b", path.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not (FOLDER / name).is_file()) == []
