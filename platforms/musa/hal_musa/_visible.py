"""``MUSA_VISIBLE_DEVICES``: the one variable that selects Moore Threads devices.

torch_musa documents ordinals ("04_quick_start.md": read by the driver). No public text says how the driver treats
errors; what CUDA does is assumed: the list ends at its first invalid entry, and a repeated entry hides everything.
MTML's UUIDs, whole or shortened, are accepted as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hal.errors import VisibilityError
from hal_musa._gpus import Gpu

__all__ = ["VARIABLE", "resolve"]

VARIABLE = "MUSA_VISIBLE_DEVICES"
_ORDINAL = re.compile(r"\d{1,9}\Z", re.ASCII)
_UUID = re.compile(r"(?:GPU-)?([0-9a-f]{2,}[0-9a-f-]*-?)\Z", re.ASCII | re.IGNORECASE)


def resolve(value: str | None, gpus: Sequence[Gpu]) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that a value shows, in its order, and why they are fewer than written.

    Raises:
        VisibilityError: a shortened UUID fits several GPUs.
    """
    if value is None:
        return tuple(gpus), ""
    if not value.strip():
        return (), "it is empty, which hides every GPU"
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in value.split(",")):
        gpu = _find(entry, gpus)
        if gpu is None:
            return tuple(chosen), f"the list ends at {entry!r}: there is no such GPU"
        if gpu in chosen:
            return (), f"{entry!r} names a GPU for the second time, which hides every GPU"
        chosen.append(gpu)
    return tuple(chosen), ""


def by_ordinal(value: str | None) -> bool:
    """Whether the value counts GPUs, so that their order matters."""
    return value is None or any(_ORDINAL.match(part.strip()) for part in value.split(","))


def _find(entry: str, gpus: Sequence[Gpu]) -> Gpu | None:
    if _ORDINAL.match(entry):
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    match = _UUID.match(entry)
    found = [gpu for gpu in gpus if match and gpu.uuid.lower().removeprefix("gpu-").startswith(match[1].lower())]
    if len(found) > 1:
        matches = ", ".join(gpu.uuid for gpu in found)
        raise VisibilityError(
            f"{VARIABLE} names {entry!r}, which fits {len(found)} GPUs: {matches}; write more of the UUID",
            variables={VARIABLE: entry},
        )
    return found[0] if found else None
