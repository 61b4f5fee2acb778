"""``hal verify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from hal.cli._progress import needs_torch, progress
from hal.cli._render import json_option, line, print_json, table
from hal.errors import UnknownKernelError, UnknownOpError

__all__ = ["command"]


@click.command("verify")
@click.option(
    "--kernel", "kernels", metavar="NAME", multiple=True, help="Only this kernel or library; may be repeated."
)
@click.option("--op", metavar="OP", help="Only the kernels of this op.")
@click.option(
    "--device", metavar="DEVICE", help="A device of this machine, such as nvidia:0. Default: the default one."
)
@click.option("--quick", is_flag=True, help="Fewer requests a kernel: a smoke test.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, kernels: Sequence[str], op: str | None, device: str | None, quick: bool, as_json: bool
) -> None:
    """Run kernels on this machine and compare them with the reference.

    What passes is recorded as verified; what fails is recorded too, and is not chosen again on this device with these
    versions. Without --kernel and --op, all that this device can run is tried. Exits with 1 if something failed.
    """
    _check_names(kernels, op)
    needs_torch("verify")
    from hal import testing

    with progress() as say:
        rows = testing.verify(op=op, kernels=tuple(kernels), device=device, quick=quick, progress=say)
    failed = [row for row in rows if row.status == "failed"]
    if as_json:
        print_json({"rows": [_facts(row) for row in rows], "verified": len(rows) - len(failed), "failed": len(failed)})
    else:
        _show(rows, failed)
    if failed or not rows:
        ctx.exit(1)


def _check_names(kernels: Sequence[str], op: str | None) -> None:
    from hal import _plugins

    registry = _plugins.registry()
    try:
        if op is not None:
            registry.op(op)
        for name in kernels:
            registry.check_known(name, "--kernel")
    except (UnknownOpError, UnknownKernelError) as error:
        raise click.UsageError(str(error)) from error


def _facts(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("kernel", "status", "corner", "key", "detail", "date")}


def _show(rows: Sequence[Any], failed: Sequence[Any]) -> None:
    if not rows:
        line("nothing was run: no kernel that was asked for can run here; `hal doctor` says why", indent=0)
        return
    counts = Counter((row.kernel, row.status) for row in rows)
    names = sorted({row.kernel for row in rows})
    body = [(name, str(counts[name, "verified"]), str(counts[name, "failed"])) for name in names]
    table(("kernel", "requests verified", "requests failed"), body, indent=0)
    for row in failed:
        corner = ", ".join(f"{name} {value}" for name, value in row.corner.items() if value not in (False, None))
        line(f"failed: {row.kernel} ({corner}): {row.detail}", indent=0)
