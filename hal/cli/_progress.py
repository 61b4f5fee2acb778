"""Progress of commands that run kernels: one line that moves in a terminal, a line a step otherwise, on stderr."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from hal.errors import HalError

__all__ = ["needs_torch", "progress"]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives the function to call with what is being done."""
    if not sys.stderr.isatty():
        yield lambda text: click.echo(text, err=True)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(Text(text))


def needs_torch(command: str) -> None:
    """Stop here if torch is not installed.

    Raises:
        HalError: saying so.
    """
    if importlib.util.find_spec("torch") is None:
        raise HalError(f"`hal {command}` runs kernels, and torch is not installed: `pip install torch`")
