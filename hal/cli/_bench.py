"""``hal bench``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from hal.cli._model_requests import model_option, requests_of
from hal.cli._progress import needs_torch, progress
from hal.cli._render import heading, json_option, line, print_json, table
from hal.cli._request_options import OpGroup

if TYPE_CHECKING:
    from hal._bench import Row
    from hal_ops import Op, Request

__all__ = ["command"]

_device_option = click.option(
    "--device", metavar="DEVICE", help="A device of this machine, such as nvidia:0. Default: the default device."
)
_kernel_option = click.option(
    "--kernel",
    "kernels",
    metavar="NAME",
    multiple=True,
    help="Only this kernel or library, a reference too; may be repeated.",
)
_repeats_option = click.option(
    "--repeats", type=click.IntRange(min=4), default=30, show_default=True, metavar="N", help="Samples a kernel."
)
_OPTIONS = (_device_option, _kernel_option, _repeats_option, json_option)


def run(_: click.Context, op: Op, request: Request, **own: Any) -> None:
    """Time one request."""
    _run({op.name: request}, **own)


@click.pass_context
def _models(ctx: click.Context, /, *, models: Sequence[str], device: str | None, **own: Any) -> None:
    """Time the requests of well-known models."""
    needs_torch("bench")
    _run(requests_of(models, device), device=device, **own)


def _run(
    requests: dict[str, Request], *, device: str | None, kernels: Sequence[str], repeats: int, as_json: bool
) -> None:
    needs_torch("bench")
    from hal import _devices
    from hal._bench import bench

    where = _devices.device(device)
    results: dict[str, list[Row]] = {}
    with progress() as say:
        for name, request in requests.items():
            results[name] = bench(request, device=where, kernels=tuple(kernels), repeats=repeats, progress=say)
    if as_json:
        print_json(_facts(where, results))
    else:
        _show(where, results)


def _facts(device: Any, results: dict[str, list[Row]]) -> dict[str, Any]:
    """The times, and everything that they depend on."""
    from hal.cli._report import installed_libraries, versions

    rows = [{"name": name, **row.as_dict()} for name, found in results.items() for row in found]
    return {
        "date": dt.date.today().isoformat(),
        "device": device.as_dict(),
        "versions": versions(),
        "libraries": installed_libraries(),
        "results": rows,
    }


def _show(device: Any, results: dict[str, list[Row]]) -> None:
    from hal.cli._report import versions

    found = versions()
    drivers = [f"{n} {v}" for n, v in (("runtime", device.runtime), ("driver", device.driver)) if v.known]
    line(", ".join([str(device), *drivers, f"torch {found['torch']}", f"triton {found['triton']}"]), indent=0)
    for name, rows in results.items():
        request = rows[0].request.describe() if rows else ""
        heading(f"{name}: {request}" if request else name)
        if not rows:
            line("no kernel that was asked for can run it here; `hal explain` says why")
            continue
        for lines in _tables(rows):
            table(*lines)


def _tables(rows: Sequence[Row]) -> Iterator[tuple[Sequence[str], list[Sequence[str]]]]:
    """One table a phase; the columns of rates are there where the work is known."""
    for phase in dict.fromkeys(row.phase for row in rows):
        mine = [row for row in rows if row.phase == phase]
        rated = any(row.tflops is not None for row in mine)
        sizes = next((row.sizes for row in mine if row.sizes), phase)
        label = f"{phase}, {sizes}" if phase != "call" else sizes
        headers = [label, "microseconds", "spread", "x best", *(("TFLOP/s", "GB/s") if rated else ()), "known as"]
        yield headers, [_cells(row, rated) for row in mine]


def _cells(row: Row, rated: bool) -> list[str]:
    if row.error:
        return [row.kernel, *["-"] * (5 if rated else 3), f"{row.known}; fails at this size: {row.error}"]
    times = [f"{row.microseconds:.1f}", f"{row.spread:.1f}", f"{row.ratio:.2f}"]
    rates = [f"{row.tflops:.4g}", f"{row.gbytes:.4g}"] if rated else []
    return [row.kernel, *times, *rates, row.known]


command = OpGroup(
    "bench",
    run,
    _OPTIONS,
    alone=_models,
    alone_options=(model_option, *_OPTIONS),
    help="Time the kernels that can run for a request on this machine, side by side.\n\n"
    "Without OP, the requests of well-known models are timed. Nothing is recorded, and the choice stays as it is: `hal "
    "tune` is for that. Inputs and plans are made before; the time is that of one call.",
)
