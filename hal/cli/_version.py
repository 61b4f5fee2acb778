"""``hal version``."""

from __future__ import annotations

import click

from hal.cli._render import json_option, print_json

__all__ = ["command"]


@click.command("version")
@json_option
def command(as_json: bool) -> None:
    """Print the version of torch-hal."""
    from hal import __version__

    if as_json:
        print_json({"torch-hal": __version__})
    else:
        click.echo(__version__)
