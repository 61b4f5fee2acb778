"""The command group: finds commands, sets up logging, and turns HAL's errors into messages and exit codes."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from hal.cli._render import print_json
from hal.errors import HalError, NoKernelError, SettingError, did_you_mean

__all__ = ["COMMANDS", "app"]

COMMANDS = ("doctor", "devices", "kernels", "explain", "env", "verify", "bench", "tune", "lock", "diff", "version")
"""In the order of ``hal --help``; command ``x`` is ``command`` in module ``hal.cli._x``."""

log = logging.getLogger("hal")


class App(click.Group):
    """Loads a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"hal.cli._{cmd_name}").command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"no command is called {name!r}.{did_you_mean(name, COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _logging_to_stderr(_log_level()):
            try:
                return super().invoke(ctx)
            except HalError as error:
                log.debug("%s was raised here:", type(error).__name__, exc_info=True)
                _report(error, as_json=ctx.meta.get("hal.json", False))
                ctx.exit(1)


@click.command(cls=App, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="torch-hal", message="%(version)s")
def app() -> None:
    """What this machine has, which kernels HAL would choose on it, and why.

    Start with `hal doctor`. Every command takes --json; variables named HAL_* are listed by `hal env`.
    """


def _report(error: HalError, *, as_json: bool) -> None:
    if not as_json:
        click.echo(str(error), err=True)
        return
    facts: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, NoKernelError):
        facts["selection"] = error.as_dict()
    print_json({"error": facts})


def _log_level() -> str:
    """``HAL_LOG``. A wrong setting is reported by the command that needs settings; it must not silence ``hal env``."""
    from hal import _settings

    try:
        level: str = _settings.current()["log"]
    except SettingError:
        return "warning"
    return level


@contextmanager
def _logging_to_stderr(level: str) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("hal %(levelname)s: %(message)s"))
    before, handlers = log.level, list(log.handlers)
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    try:
        yield
    finally:
        log.handlers[:] = handlers
        log.setLevel(before)
