"""Output: plain when piped, styled and wrapped in a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from hal.cli import _render

LONG = "a sentence of many words that goes on and on " * 8


def test_plain_tables_are_aligned_and_never_cut(capsys) -> None:
    _render.table(("name", "text"), [("a", LONG.strip()), ("longer", ["one", "two"])])
    assert capsys.readouterr().out.splitlines() == ["  name    text", f"  a       {LONG.strip()}", "  longer  one; two"]


def test_plain_paragraphs_are_never_wrapped(capsys) -> None:
    _render.line(LONG.strip(), indent=0)
    assert capsys.readouterr().out == LONG.strip() + "\n"


def test_lines_of_a_paragraph_stay_lines(capsys) -> None:
    _render.line("first\n  second", indent=2)
    assert capsys.readouterr().out == "  first\n    second\n"


@pytest.fixture
def wide(monkeypatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "60"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("wide")
def test_terminal_tables_keep_names_whole(capsys) -> None:
    _render.table(("kernel", "text"), [("a_kernel.of_a_long_name", LONG)])
    text = _bare(capsys.readouterr().out)
    assert "a_kernel.of_a_long_name" in text
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.usefixtures("wide")
def test_terminal_too_narrow_for_a_table_gets_a_block_a_row(capsys) -> None:
    _render.table(("kernel", "one", "two", "three"), [("some.kernel", "x" * 25, "y" * 25, "z y x")])
    lines = capsys.readouterr().out.splitlines()
    assert "some.kernel" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["one", "two", "three"]


@pytest.mark.usefixtures("wide")
def test_explanation_wraps_below_its_last_column(capsys) -> None:
    start = "prefill   some.kernel  refused   "
    _render.explanation(start + "sinks: the function takes no sinks, and that is what was asked for")
    lines = [_bare(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 1
    assert lines[0].startswith(start)
    assert all(line.startswith(" " * len(start)) and line[len(start)] != " " for line in lines[1:])


@pytest.mark.usefixtures("wide")
def test_markup_in_values_is_text(capsys) -> None:
    _render.table(("a", "b"), [("[red]x[/red]", "`pip install 'torch-hal[nvidia]'`")])
    _render.heading("[bold]title")
    text = capsys.readouterr().out
    assert "[red]x[/red]" in text
    assert "torch-hal[nvidia]" in text
    assert "[bold]title" in text


def _bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


COMMAND = [sys.executable, "-m", "hal", "kernels"]


def test_a_real_terminal_gets_colour() -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(COMMAND, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        data = b""
        while chunk := _read(master):
            data += chunk
    os.close(master)
    assert process.returncode == 0
    assert b"\x1b[" in data
    assert b"attention" in data


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # Linux ends a pseudo-terminal with EIO
        return b""


def test_a_pipe_gets_plain_ascii_rows() -> None:
    env = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    out = subprocess.run(COMMAND, capture_output=True, check=True, env={**env, "COLUMNS": "40"}).stdout
    assert b"\x1b" not in out
    assert out.isascii()
    row = next(line for line in out.decode().splitlines() if "reference.prefill" in line)
    assert "any device" in row
    assert "torch-hal" in row


def test_a_long_cell_makes_no_plain_column_wide(capsys) -> None:
    _render.table(("name", "what", "why"), [("a", "x" * 200, "y"), ("b", "short", "z")])
    expected = ["  name  what   why", f"  a     {'x' * 200}  y", "  b     short  z"]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_kernel_is_told_of_by_the_library_that_is_its_own(hal_json) -> None:
    """Everything needs torch: its row has what needs nothing else, and Triton's what needs nothing but these two."""
    rows = {row["library"]: row["kernels"] for row in hal_json("doctor")["libraries"]}
    assert {name.partition(".")[0] for name in rows["triton"]} == {"triton"}
    assert "reference.prefill" in rows["torch"]
    assert not {"triton.prefill", "fa3.prefill", "aiter.prefill"} & {*rows["torch"]}
    assert "fa3.prefill" in rows["flash-attn-3"]
