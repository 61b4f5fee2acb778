"""``--model``: the requests of well-known models, decided for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from hal.errors import did_you_mean

if TYPE_CHECKING:
    from hal_ops import Request

__all__ = ["decided", "model_option", "requests_of"]


def _known(ctx: click.Context, param: click.Parameter, names: Sequence[str]) -> tuple[str, ...]:
    """The models' own names, however they are written.

    Raises:
        click.BadParameter: there is no such model.
    """
    if not names:
        return ()
    from hal.cli._models import MODELS

    known = {model.name.lower(): model.name for model in MODELS}
    for name in names:
        if name.lower() not in known:
            hint = did_you_mean(name, known.values())
            raise click.BadParameter(f"no model called {name!r} is known.{hint} Known: {', '.join(known.values())}")
    return tuple(known[name.lower()] for name in names)


model_option = click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    callback=_known,
    help="The requests of this model, one of those that `hal doctor` lists; may be repeated.",
)


def requests_of(models: Sequence[str], device: Any, kernel: str | None = None) -> dict[str, Request]:
    """What the layers are to the request that each becomes on the device; all models where none is named.

    Layers that share a cache are decided together. Models that ask for the same are one entry, under all their names.
    """
    from hal import _devices
    from hal.cli._models import MODELS, requests_for

    where = _devices.device(device)
    names: dict[Request, list[str]] = {}
    for model in (m for m in MODELS if not models or m.name in models):
        for cache, layers in requests_for(model, where).items():
            for kind, request in zip(layers, decided(list(layers.values()), where, kernel), strict=True):
                names.setdefault(request, []).append(" ".join(filter(None, (model.name, kind, cache))))
    return {", ".join(found): request for request, found in names.items()}


def decided(requests: Sequence[Request], device: Any, kernel: str | None = None) -> list[Request]:
    """The requests with what they leave open, as selection decides it for all of them together."""
    from hal import _selection

    return [s.request for s in _selection.select_together(requests, device=device, kernel=kernel)]
