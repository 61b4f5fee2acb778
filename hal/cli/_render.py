"""Output: tables and paragraphs, styled in a terminal, plain when piped, and JSON.

Plain text is for ``grep`` and files: a line a row, whole whatever its length, no colours, no boxes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["explanation", "heading", "json_option", "line", "print_json", "table", "terminal"]

F = TypeVar("F", bound=Callable[..., Any])

_WORDS = {
    **dict.fromkeys(("chosen", "loaded", "made", "yes"), "green"),
    **dict.fromkeys(("eligible", "denied"), "cyan"),
    **dict.fromkeys(("refused", "failed", "no", "no kernel", "wrong", "crash"), "red"),
}
"""Styles of words that stand alone: a whole cell of a table, or the verdict in an explanation."""

_VERDICT = re.compile(r"^ *(?:\S+ +)?(?:\S+ +)?(?<=.{10})(?P<word>chosen|eligible|refused|no kernel)(?: +|$)")
_LABEL = re.compile(r"^ *\S+ {2,}| +")


def json_option(command: F) -> F:
    """Add ``--json``. The command receives it as ``as_json``; errors are then JSON too."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta["hal.json"] = value
        return value

    option = click.option("--json", "as_json", is_flag=True, callback=remember, is_eager=True, help="Answer in JSON.")
    return option(command)


def print_json(data: Any) -> None:
    """Write one JSON document to stdout."""
    click.echo(json.dumps(data, indent=2, default=str))


def terminal() -> Console | None:
    """A console if stdout is a terminal, else None. rich is imported only then."""
    if not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR")):
        return None
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else None


def heading(text: str, *, first: bool = False) -> None:
    """The title of a section, after an empty line unless it is the first."""
    console = terminal()
    if not first:
        click.echo()
    if console is None:
        click.echo(text)
    else:
        console.print(text, style="bold", markup=False)


def line(text: str, indent: int = 2) -> None:
    """One paragraph, or several lines; wrapped below their own start in a terminal."""
    console = terminal()
    for row in text.splitlines():
        start = " " * (indent + len(row) - len(row.lstrip()))
        if console is None:
            click.echo(" " * indent + row)
            continue
        for part in textwrap.wrap(row.strip(), max(console.width - len(start), 40)):
            console.print(_styled(start + part), soft_wrap=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, indent: int = 2) -> None:
    """A table. A cell is a text, or texts that stand below each other in a terminal and after each other in a pipe."""
    body = [tuple(_parts(cell) for cell in row) for row in rows]
    console = terminal()
    if console is None:
        _plain_table(headers, body, indent)
    else:
        _rich_table(console, headers, body, indent)


def explanation(text: str) -> None:
    """A selection's explanation: coloured, and wrapped below the column it belongs to, in a terminal."""
    console = terminal()
    if console is None:
        click.echo(text)
        return
    for row in text.splitlines():
        for part in _hung(row, console.width):
            console.print(_styled(part), soft_wrap=True)


def _parts(cell: Any) -> tuple[str, ...]:
    return (cell,) if isinstance(cell, str) else tuple(cell)


_WIDE = 60
"""Characters of a cell for which a whole plain column is made as wide; longer ones stand out of theirs."""


def _plain_table(headers: Sequence[str], rows: list[tuple[tuple[str, ...], ...]], indent: int) -> None:
    lines = [tuple(headers), *(tuple("; ".join(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in lines if len(row[i]) <= _WIDE or row is lines[0]) for i in range(len(headers))]
    for row in lines:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo(" " * indent + "  ".join(cells).rstrip())


def _rich_table(console: Console, headers: Sequence[str], rows: list[tuple[tuple[str, ...], ...]], indent: int) -> None:
    from rich.padding import Padding
    from rich.table import Table

    least = [max(map(len, (header, *_words(rows, i)))) for i, header in enumerate(headers)]
    if indent + sum(least) + 2 * len(headers) > console.width:
        _records(console, headers, rows, indent)
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header, width in zip(headers, least, strict=True):
        shown.add_column(header, overflow="fold", min_width=width)
    for row in rows:
        shown.add_row(*(_styled("\n".join(cell)) for cell in row))
    console.print(Padding(shown, (0, 0, 0, indent)))


def _words(rows: list[tuple[tuple[str, ...], ...]], column: int) -> list[str]:
    return [word for row in rows for part in row[column] for word in part.split()]


def _records(console: Console, headers: Sequence[str], rows: list[tuple[tuple[str, ...], ...]], indent: int) -> None:
    """A table for a terminal too narrow for it: a block a row."""
    label = max(len(header) for header in headers)
    for row in rows:
        console.print(" " * indent + "; ".join(row[0]), style="bold", markup=False, soft_wrap=True)
        for header, cell in list(zip(headers, row, strict=True))[1:]:
            hang = indent + 2 + label + 2
            texts = textwrap.wrap("; ".join(cell), max(console.width - hang, 20)) or [""]
            console.print(_styled(f"{' ' * (indent + 2)}{header:<{label}}  {texts[0]}"), soft_wrap=True)
            for text in texts[1:]:
                console.print(_styled(" " * hang + text), soft_wrap=True)


def _styled(text: str) -> Text:
    from rich.text import Text

    styled = Text(text, style=_WORDS.get(text, ""))
    styled.highlight_regex(r"`[^`]+`", "bold")
    verdict = _VERDICT.match(text)
    if verdict:
        styled.stylize(_WORDS[verdict["word"]], *verdict.span("word"))
    return styled


def _hung(row: str, width: int) -> list[str]:
    """One line of an explanation, wrapped with what follows below the start of its last column."""
    match = _VERDICT.match(row) or _LABEL.match(row)
    hang = match.end() if match else 0
    if len(row) <= width or hang > width - 20:
        return [row]
    start, rest = row[:hang], row[hang:]
    wrapped = textwrap.wrap(rest, width - hang, break_long_words=False, break_on_hyphens=False)
    return [start + wrapped[0], *(" " * hang + part for part in wrapped[1:])] if wrapped else [row]
