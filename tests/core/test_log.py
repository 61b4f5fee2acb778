"""``HAL_LOG``: what a program that sets up no logging of its own sees on stderr."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

import hal

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


IN_A_BLOCK = """
import logging, os, threading, hal
log = logging.getLogger("hal")

def tell(where):
    hal.devices("cpu")
    log.debug("a detail %s", where)
    log.warning("a warning %s", where)

def elsewhere(where):
    thread = threading.Thread(target=tell, args=(where,))
    thread.start()
    thread.join()

tell("before")
with hal.override(log="debug"):
    tell("in debug")
    elsewhere("of another thread")
    with hal.override(log="error"):
        tell("in error")
    tell("in debug again")
tell("after")
try:
    with hal.override(log="error"):
        raise RuntimeError
except RuntimeError:
    tell("after an exception")
print(log.level, log.handlers, log.filters)
os.environ["HAL_LOG"] = "debug"
tell("by variable")
with hal.override(log="error"):
    tell("in error too")
tell("by variable again")
del os.environ["HAL_LOG"]
tell("at last")
print(log.level, log.handlers, log.filters)
"""


def test_a_level_holds_for_its_block_and_a_variable_while_it_is_set() -> None:  # requirement C8
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
    command = [sys.executable, "-c", IN_A_BLOCK]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if " a detail" in line or "a warning" in line] == [
        "a warning before",
        "hal DEBUG: a detail in debug",
        "hal WARNING: a warning in debug",
        "hal WARNING: a warning of another thread",
        "hal DEBUG: a detail in debug again",
        "hal WARNING: a warning in debug again",
        "a warning after",
        "a warning after an exception",
        "hal DEBUG: a detail by variable",
        "hal WARNING: a warning by variable",
        "hal DEBUG: a detail by variable again",
        "hal WARNING: a warning by variable again",
        "a warning at last",
    ]
    assert done.stdout == "0 [] []\n" * 2


def test_what_the_application_set_holds_again() -> None:
    log = logging.getLogger("hal")
    handler = logging.NullHandler()
    log.addHandler(handler)
    log.setLevel("ERROR")
    with hal.override(log="debug"):
        assert log.isEnabledFor(logging.DEBUG)
    assert (log.level, log.handlers[-1]) == (logging.ERROR, handler)
    with hal.override(log="debug"):
        log.setLevel("INFO")
    assert log.level == logging.INFO
