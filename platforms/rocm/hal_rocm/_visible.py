"""``ROCR_VISIBLE_DEVICES``, ``HIP_VISIBLE_DEVICES`` and ``CUDA_VISIBLE_DEVICES`` as AMD's runtimes read them.

The rules, from ROCR-Runtime ``core/runtime/amd_filter_device.cpp`` and clr ``rocclr/device/rocm/rocdevice.cpp``:

* ROCR filters first: unset shows every GPU, empty none; entries are ordinals or beginnings of ``GPU-<unique id>`` in
  any case; the list ends at the first entry that is invalid, ambiguous or repeated.
* HIP then counts what is left. ``HIP_VISIBLE_DEVICES`` wins over ``CUDA_VISIBLE_DEVICES``; entries are ordinals written
  plainly (`` 1`` with a blank is invalid) or UUIDs; the list ends at the first invalid entry; repeats count once.
* An empty HIP list shows every GPU to HIP, but ``torch.cuda`` counts none (torch 2.13, ``_parse_visible_devices``);
  here it hides all of them, as torch does.

Contradictions, which the runtimes settle silently, are errors here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hal import Evidence
from hal.errors import VisibilityError
from hal_rocm._gpus import Gpu, plural

__all__ = ["visible_gpus"]

_ROCR, _HIP, _CUDA = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"
_LONGEST = len("GPU-") + 16
_PLAIN = re.compile(r"(?:0|[1-9]\d{0,8})\Z", re.ASCII)
_NUMBER = re.compile(
    r"\+?(?:0x(?P<hex>[0-9a-f]{1,8})|0(?P<octal>[0-7]{1,8})|(?P<decimal>\d{0,8}))\Z", re.ASCII | re.IGNORECASE
)


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[tuple[Gpu, ...], list[Evidence]]:
    """The GPUs that HIP shows, in its order, and what each variable did.

    Raises:
        VisibilityError: two variables contradict each other, or a shortened UUID fits several GPUs.
    """
    evidence: list[Evidence] = []
    shown = tuple(gpus)
    if _ROCR in environ:
        shown, note = _rocr(environ[_ROCR], shown)
        evidence.append(_evidence(_ROCR, environ[_ROCR], shown, note))
    name = _hip_variable(environ)
    if name is None:
        return shown, evidence
    before = shown
    shown, note, past = _hip(name, environ[name], before)
    if past and _ROCR in environ:
        raise _contradiction(environ, name, len(before))
    return shown, [*evidence, _evidence(name, environ[name], shown, note)]


def _evidence(name: str, value: str, shown: Sequence[Gpu], note: str) -> Evidence:
    return Evidence(name, f"{value!r} shows {plural(len(shown), 'device')}" + (f": {note}" if note else ""), len(shown))


def _hip_variable(environ: Mapping[str, str]) -> str | None:
    if _HIP in environ and _CUDA in environ and _entries(environ[_HIP]) != _entries(environ[_CUDA]):
        raise VisibilityError(
            f"{_HIP}={environ[_HIP]!r} and {_CUDA}={environ[_CUDA]!r} contradict each other; HIP would take the first, "
            "other libraries may take the second: set one of them, or both to the same value",
            variables={_HIP: environ[_HIP], _CUDA: environ[_CUDA]},
        )
    return next((name for name in (_HIP, _CUDA) if name in environ), None)


def _entries(value: str) -> list[str]:
    return [entry.strip() for entry in value.split(",")]


def _contradiction(environ: Mapping[str, str], name: str, left: int) -> VisibilityError:
    ordinals = f"0 to {left - 1}" if left > 1 else "only 0" if left else "none"
    return VisibilityError(
        f"{_ROCR}={environ[_ROCR]!r} leaves {plural(left, 'GPU')}, and {name}={environ[name]!r} counts what is left "
        f"({ordinals}), not the whole machine: unset one of them",
        variables={_ROCR: environ[_ROCR], name: environ[name]},
    )


def _rocr(value: str, gpus: Sequence[Gpu]) -> tuple[tuple[Gpu, ...], str]:
    if not value:
        return (), "it is empty, which hides every GPU"
    chosen: list[Gpu] = []
    for entry in _entries(value)[: len(gpus)]:
        gpu = _by_uuid(_ROCR, entry, gpus) if entry[:1].upper() == "G" else _by_number(entry, gpus)
        if gpu is None or gpu in chosen:
            why = "there is no such GPU" if gpu is None else "it is repeated"
            return tuple(chosen), f"the list ends at {entry!r}: {why}"
        chosen.append(gpu)
    return tuple(chosen), ""


def _by_number(entry: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """C's ``strtol`` with base 0: ``0x1`` and ``01`` are numbers too, and an empty entry is 0."""
    match = _NUMBER.match(entry)
    if match is None:
        return None
    base = 16 if match["hex"] else 8 if match["octal"] else 10
    number = int(match["hex"] or match["octal"] or match["decimal"] or "0", base)
    return gpus[number] if number < len(gpus) else None


def _by_uuid(variable: str, entry: str, gpus: Sequence[Gpu]) -> Gpu | None:
    if not len("GPU-") < len(entry) <= _LONGEST:
        return None
    found = [gpu for gpu in gpus if gpu.uuid and gpu.uuid.upper().startswith(entry.upper())]
    if len(found) > 1:
        matches = ", ".join(gpu.uuid for gpu in found)
        raise VisibilityError(
            f"{variable} names {entry!r}, which fits {len(found)} GPUs: {matches}; write more of the UUID",
            variables={variable: entry},
        )
    return found[0] if found else None


def _hip(name: str, value: str, gpus: Sequence[Gpu]) -> tuple[tuple[Gpu, ...], str, bool]:
    """The GPUs, a note, and whether the list ended at an ordinal past the last GPU."""
    if not value:
        return (), "it is empty, which torch takes to hide every GPU (HIP itself would show them)", False
    chosen: list[Gpu] = []
    for entry in value.split(","):
        plain = _PLAIN.match(entry) is not None
        gpu = (gpus[int(entry)] if int(entry) < len(gpus) else None) if plain else _by_uuid(name, entry, gpus)
        if gpu is None:
            return tuple(chosen), f"the list ends at {entry!r}: there is no such GPU", plain
        if gpu not in chosen:
            chosen.append(gpu)
    return tuple(chosen), "", False
