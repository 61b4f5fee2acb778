"""``hal env``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hal.cli._render import json_option, line, print_json, table
from hal.errors import HalError, SettingError

__all__ = ["audit", "command"]


@click.command("env")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show every HAL_* variable: its value, where that came from, and what it does.

    Exits with 1 if a variable, or the config file, holds something that HAL does not know.
    """
    rows, errors = audit()
    if as_json:
        print_json({"settings": rows, "errors": errors})
    else:
        _show(rows, errors)
    if errors:
        ctx.exit(1)


def audit() -> tuple[list[dict[str, Any]], list[str]]:
    """Every setting with its value and source, and every error there is, not the first alone."""
    from hal import _settings

    values, errors = _config_values()
    extra = []
    for name, text in sorted(os.environ.items()):
        if name.startswith("HAL_"):
            try:
                values.update(_settings._from_variable(name, text))
            except SettingError as error:
                errors.append(str(error))
            else:
                extra += [s for s in [_settings._op_setting(name)] if s]
    rows = []
    for setting in (*_settings.SETTINGS, *extra):
        value = values.get(setting.key) or _settings.Value(setting.default, "default")
        rows.append({"name": setting.name, "value": _plain(value.value), "source": value.source})
        rows[-1].update(default=_plain(setting.default), help=setting.help, values=setting.values)
    return rows, errors or _wrong_names()


def _wrong_names() -> list[str]:
    """Names of kernels, libraries and ops that nothing has; looked up once everything else is right."""
    from hal import _forced, _plugins, _settings

    try:
        return _forced.wrong_names(_settings.current(), _plugins.registry())
    except HalError as error:
        return [str(error)]


def _config_values() -> tuple[dict[str, Any], list[str]]:
    from hal import _settings

    try:
        path, _ = _settings._config_stamp(os.environ.get("HAL_CONFIG"))
        return ({} if path is None else dict(_settings._from_config(path))), []
    except SettingError as error:
        return {}, [str(error)]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _show(rows: Sequence[dict[str, Any]], errors: Sequence[str]) -> None:
    for error in errors:
        line(f"wrong: {error}", indent=0)
    if errors:
        click.echo()
    body = [(r["name"], _shown(r["value"]), r["source"], _shown(r["default"]), r["values"], r["help"]) for r in rows]
    table(("variable", "value", "from", "default", "takes", "what it does"), body, indent=0)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return "-" if value in (None, []) else ",".join(value) if isinstance(value, list) else str(value)
