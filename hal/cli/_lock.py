"""``hal lock``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hal.cli._machine import machine, machine_options
from hal.cli._render import json_option, line, print_json

__all__ = ["command", "with_write"]


@click.command("lock")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@machine_options
@json_option
@click.pass_context
def command(ctx: click.Context, file: Path, device: str | None, libraries: tuple[str, ...], as_json: bool) -> None:
    """Write what this machine decides for well-known models to FILE.

    HAL_LOCK=FILE then repeats these decisions, those about cache writes included, or fails. `hal explain ... --lock FILE`
    adds a decision of your own, and `hal diff` compares two files. A lock file that HAL_LOCK names plays no part here.
    Exits with 1 if a model cannot be served; the others are written all the same.
    """
    from hal import override, write_lock

    with machine(device, libraries) as found, override(lock=None):
        receipts, refused = _receipts(found)
    write_lock(file, receipts)
    if as_json:
        print_json({"file": str(file), "decisions": receipts, "refused": refused})
    else:
        line(f"{len(receipts)} decisions for {found} are in {file}; HAL_LOCK={file} repeats them or fails", indent=0)
        for text in refused:
            line(text, indent=0)
    if refused:
        ctx.exit(1)


def _receipts(device: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The receipts of every model that can be served, and what cannot."""
    from hal.cli._models import MODELS, requests_for
    from hal.cli._report import select_model

    receipts: dict[str, dict[str, Any]] = {}
    refused = []
    for model in MODELS:
        for cache, requests in requests_for(model, device).items():
            for kind, selection in zip(requests, select_model(requests, device), strict=True):
                for decision in with_write(selection):
                    lacking = ", ".join(p for p, name in decision.kernels().items() if name is None)
                    if lacking:
                        refused.append(f"{model.name} {kind} {cache}: no kernel for {decision.op.name} {lacking}")
                    else:
                        receipt = decision.receipt()
                        receipts[receipt["digest"]] = receipt
    return list(receipts.values()), refused


def with_write(selection: Any) -> tuple[Any, ...]:
    """A decision, and that about the cache write which a handle would make of it, if it has a cache."""
    from hal import _attention, _front, _mla, _selection
    from hal_ops.attention import AttentionRequest
    from hal_ops.mla_attention import MlaAttentionRequest

    request = selection.request
    if not selection.complete:
        return (selection,)
    if isinstance(request, MlaAttentionRequest):
        wanted = _mla.write_request(request)
    elif isinstance(request, AttentionRequest) and _attention.check_needs_cache(request):
        wanted = _front.write_request(request)
    else:
        return (selection,)
    return selection, _selection.select(wanted, device=selection.device)
