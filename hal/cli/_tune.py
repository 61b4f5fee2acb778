"""``hal tune``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from hal.cli._progress import needs_torch, progress
from hal.cli._render import json_option, line, print_json, table
from hal.cli._request_options import OpGroup

if TYPE_CHECKING:
    from hal_ops import Op, Request

__all__ = ["command"]

_device_option = click.option(
    "--device", metavar="DEVICE", help="A device of this machine, such as nvidia:0. Default: the default device."
)


def run(_: click.Context, op: Op, request: Request, *, device: str | None, as_json: bool) -> None:
    """Measure, record, and print the times and what is chosen now."""
    needs_torch("tune")
    from hal import _selection, _tune

    with progress() as say:
        measured = _tune.tune(request, device=device, progress=say)
    chosen = _selection.select(request, device=device)
    if as_json:
        rows = [dataclasses.asdict(m) for m in measured]
        print_json({"op": op.name, "measurements": rows, "kernels": chosen.kernels()})
    else:
        _show(measured, chosen)


def _show(measured: Any, chosen: Any) -> None:
    if not measured:
        line("nothing was measured: no phase has two kernels here to choose between", indent=0)
        return
    order = sorted(measured, key=lambda m: m.microseconds)
    rows = [(m.kernel, f"{m.microseconds:.1f}", f"{m.spread:.1f}") for m in order]
    table(("kernel", "microseconds", "spread"), rows, indent=0)
    for phase, kernel in chosen.kernels().items():
        how = "by measurement" if chosen.choices[phase].measured else "as declared: no other is faster beyond the noise"
        line(f"{phase}: {kernel or 'no kernel'} is chosen, {how}", indent=0)


command = OpGroup(
    "tune",
    run,
    (_device_option, json_option),
    help="Time the kernels that can serve a request on this machine, and let the fastest correct one be chosen.\n\n"
    "Kernels are verified first, and timed only if they are right. HAL_TUNE=off leaves measurements out of the choice.",
)
