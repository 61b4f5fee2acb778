"""The command line: ``hal``, and ``python -m hal``.

Every command answers in readable tables in a terminal, in plain text when piped, and in JSON with ``--json``. Exit
codes: 0 for a yes, 1 for a no (no kernel fits, a check failed, two files differ), 2 for a wrong command line. An error
of HAL's is printed as its message; ``HAL_LOG=debug`` shows where it came from.

Importing this package imports nothing else: click, rich and the rest of HAL are loaded by the command that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line ``args`` (default: the process's own) and exit."""
    from hal.cli._app import app

    app.main(args=None if args is None else list(args), prog_name="hal")
