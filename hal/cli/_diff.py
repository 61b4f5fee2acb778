"""``hal diff``."""

from __future__ import annotations

from pathlib import Path

import click

from hal.cli._render import json_option, line, print_json

__all__ = ["command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("diff")
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@json_option
@click.pass_context
def command(ctx: click.Context, old: Path, new: Path, as_json: bool) -> None:
    """Compare the decisions of two lock files; exits with 1 if they differ."""
    from hal import diff_locks

    differences = diff_locks(old, new)
    if as_json:
        print_json({"old": str(old), "new": str(new), "differences": differences})
    else:
        for text in differences or ["the same decisions"]:
            line(text, indent=0)
    if differences:
        ctx.exit(1)
