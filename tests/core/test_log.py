"""``HAL_LOG``: what a program that sets up no logging of its own sees on stderr."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import logging, hal
hal.devices("cpu")
logging.getLogger("hal").debug("a detail")
logging.getLogger("hal").warning("a warning")
"""


def stderr(level: str | None) -> str:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
    environ.update({} if level is None else {"HAL_LOG": level})
    return subprocess.run([sys.executable, "-c", CODE], env=environ, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (None, ["a warning"]),
        ("debug", ["hal DEBUG: a detail", "hal WARNING: a warning"]),
        ("warning", ["hal WARNING: a warning"]),
        ("error", []),
    ],
)
def test_the_level_is_obeyed_and_nothing_comes_twice(level: str | None, lines: list[str]) -> None:
    assert [line for line in stderr(level).splitlines() if "a detail" in line or "a warning" in line] == lines
