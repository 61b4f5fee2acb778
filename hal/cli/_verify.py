"""``hal verify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from hal.cli._model_requests import decided, model_option, requests_of
from hal.cli._progress import needs_torch, progress
from hal.cli._render import json_option, line, print_json, table
from hal.cli._request_options import OpGroup
from hal.errors import UnknownKernelError, UnknownOpError

if TYPE_CHECKING:
    from hal_ops import Op, Request

__all__ = ["command"]

_kernel_option = click.option(
    "--kernel", "kernels", metavar="NAME", multiple=True, help="Only this kernel or library; may be repeated."
)
_op_option = click.option("--op", metavar="OP", help="Only the kernels of this op.")
_device_option = click.option(
    "--device", metavar="DEVICE", help="A device of this machine, such as nvidia:0. Default: the default one."
)
_quick_option = click.option("--quick", is_flag=True, help="Fewer requests a kernel: a smoke test.")


def run(
    ctx: click.Context, op: Op, request: Request, *, kernels: Sequence[str], device: str | None, as_json: bool
) -> None:
    """Verify for one request."""
    _check_names(kernels, None)
    needs_torch("verify")
    found = [r for name in kernels or (None,) for r in decided([request], device, name)]
    _run(ctx, as_json, op=op.name, kernels=tuple(kernels), device=device, requests=tuple(dict.fromkeys(found)))


@click.pass_context
def _alone(
    ctx: click.Context,
    /,
    *,
    kernels: Sequence[str],
    op: str | None,
    models: Sequence[str],
    device: str | None,
    quick: bool,
    as_json: bool,
) -> None:
    """Verify what kernels claim, or for the requests of models."""
    _check_names(kernels, op)
    if models and (quick or op not in (None, "attention")):
        raise click.UsageError("--model says which requests of attention to run: leave out --quick and --op")
    needs_torch("verify")
    chosen: dict[str, Any] = {"op": op, "kernels": tuple(kernels), "device": device}
    if models:
        named = (requests_of(models, device, name) for name in kernels or (None,))
        chosen |= {"op": "attention", "requests": tuple(dict.fromkeys(r for found in named for r in found.values()))}
    elif quick:
        chosen["quick"] = True
    _run(ctx, as_json, **chosen)


def _run(ctx: click.Context, as_json: bool, **chosen: Any) -> None:
    from hal import testing

    with progress() as say:
        rows = testing.verify(**chosen, progress=say)
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


command = OpGroup(
    "verify",
    run,
    (_kernel_option, _device_option, json_option),
    alone=_alone,
    alone_options=(_kernel_option, _op_option, model_option, _device_option, _quick_option, json_option),
    help="Run kernels on this machine and compare them with the reference.\n\n"
    "What passes is recorded as verified; what fails is recorded too, and is not chosen again on this device with these "
    "versions. Without OP and its request, and without --model, the corners of what kernels claim are run: of those "
    "named, else of all that this device can run. Exits with 1 if something failed.",
)
