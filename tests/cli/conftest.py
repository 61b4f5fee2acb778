"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

Hal = Callable[..., Result]


@pytest.fixture
def hal_cli() -> Hal:
    """Run ``hal`` with these arguments in this process; an exception that is no exit fails the test."""
    from hal.cli._app import app

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, args, prog_name="hal", catch_exceptions=False)

    return run


@pytest.fixture
def hal_json(hal_cli: Hal) -> Callable[..., Any]:
    """Run ``hal ... --json``, check the exit code, and give what it printed."""

    def run(*args: str, code: int = 0) -> Any:
        result = hal_cli(*args, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def llama_options() -> list[str]:
    """The request of a Llama-3-8B layer as options."""
    return ["--num-q-heads", "32", "--num-kv-heads", "8", "--head-dim", "128"]
