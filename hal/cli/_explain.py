"""``hal explain``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hal.cli._machine import machine, machine_options
from hal.cli._render import explanation, json_option, line, print_json
from hal.cli._request_options import OpGroup
from hal.errors import NoKernelError, UnknownKernelError

if TYPE_CHECKING:
    from hal_ops import Op, Request

__all__ = ["command", "kernel_option"]

_KERNEL_HELP = (
    "Force a kernel or a library; PHASE=NAME forces it for one phase, and may be given more than once. It is obeyed or "
    "refused, never replaced."
)

kernel_option = click.option("--kernel", "kernels", metavar="NAME", multiple=True, help=_KERNEL_HELP)
_lock_option = click.option(
    "--lock",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Put this decision into a lock file.",
)


def run(
    ctx: click.Context,
    op: Op,
    request: Request,
    *,
    device: str | None,
    libraries: Sequence[str],
    kernels: Sequence[str],
    lock: Path | None,
    as_json: bool,
) -> None:
    """Decide, and print the decision; exit with 1 if a phase has no kernel."""
    with machine(device, libraries) as found:
        selection = _select(request, found, forced(kernels))
        if as_json:
            print_json(selection.as_dict())
        else:
            explanation(_text(selection))
        if lock is not None and selection.complete:
            _keep(lock, selection, quiet=as_json)
    if not selection.complete:
        ctx.exit(1)


def forced(kernels: Sequence[str]) -> str | dict[str, str] | None:
    """What ``hal.select(kernel=...)`` takes, from ``NAME`` and ``PHASE=NAME`` texts."""
    if len(kernels) == 1 and "=" not in kernels[0]:
        return kernels[0]
    pairs = [text.rpartition("=") for text in kernels]
    return {phase.strip() or "*": name.strip() for phase, _, name in pairs} or None


def _select(request: Request, device: Any, kernel: str | dict[str, str] | None) -> Any:
    from hal import _selection

    try:
        return _selection.select(request, device=device, kernel=kernel)
    except UnknownKernelError as error:
        if kernel is None:
            raise
        raise click.BadParameter(str(error), param_hint="'--kernel'") from error


def _text(selection: Any) -> str:
    from hal import _selection

    try:
        return str(_selection.require(selection).explain())
    except NoKernelError as error:
        return str(error)


def _keep(path: Path, selection: Any, *, quiet: bool) -> None:
    from hal._lock_file import differences, key_of, read_lock, write_lock
    from hal.cli._lock import with_write

    added = {key_of(r): r for r in (d.receipt() for d in with_write(selection) if d.complete)}
    kept = {key_of(r): r for r in (read_lock(path) if path.exists() else ())}
    write_lock(path, {**kept, **added}.values())
    for key in added.keys() & kept.keys():
        if added[key]["digest"] != kept[key]["digest"]:
            changed = "; ".join(differences(kept[key], added[key])) or "another digest"
            click.echo(f"replaced  a decision about {added[key]['op']} that was in {path}: {changed}", err=quiet)
    if not quiet:
        line(f"locked    the decision is in {path}; HAL_LOCK={path} repeats it or fails", indent=0)


command = OpGroup(
    "explain",
    run,
    (machine_options, kernel_option, _lock_option, json_option),
    help="Explain which kernels would be chosen for a request, and why not each of the others.\n\n"
    "Exits with 1 if nothing can serve the request, or what is forced cannot. Nothing is imported or run.",
)
