"""``CUDA_VISIBLE_DEVICES`` as the CUDA driver reads it.

The rules (CUDA programming guide, "CUDA Environment Variables"; MIG user guide, "CUDA Device Enumeration"; those on
whole GPUs also tried on driver 580.159.04 with one H200):

* unset shows every GPU, an empty text none;
* the list ends at its first invalid entry, and a repeated entry hides everything (``CUDA_ERROR_INVALID_DEVICE``);
* an entry is an ordinal (leading digits count: ``1gpu`` is 1), a GPU UUID or the beginning of one, a MIG UUID
  (driver 470 and newer), or ``MIG-GPU-<uuid>/<GPU instance>/<compute instance>`` (older);
* ``GPU`` and ``MIG`` are upper case, digits of a UUID need not be; no blank comes before a UUID;
* the first entry's kind is the whole list's kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from hal.errors import VisibilityError
from hal_nvidia._cards import Card
from hal_ops import record

__all__ = ["Visible", "VisibleId", "parse_visible", "resolve"]

_ORDINAL = re.compile(r"[+-]?\d+", re.ASCII)
_GPU = re.compile(r"GPU-[0-9a-fA-F-]+\Z", re.ASCII)
_MIG = re.compile(r"MIG-[0-9a-fA-F-]+\Z", re.ASCII)
_MIG_PATH = re.compile(r"MIG-(GPU-[0-9a-fA-F-]+)/(\d+)/(\d+)\Z", re.ASCII)
_VARIABLE = "CUDA_VISIBLE_DEVICES"


@record(frozen=True)
class VisibleId:
    """One valid entry. ``kind`` is ``"ordinal"``, ``"gpu"``, ``"mig"`` or ``"mig-path"``.

    ``uuid`` may be the beginning of one; it keeps its ``GPU-`` or ``MIG-``. ``instance`` is (GPU, compute) instance.
    """

    kind: str
    text: str
    ordinal: int | None = None
    uuid: str = ""
    instance: tuple[int, int] | None = None


@record(frozen=True)
class Visible:
    """The value as typed ids. ``everything``: the variable is unset. ``note``: why the ids are fewer than written."""

    ids: tuple[VisibleId, ...] = ()
    everything: bool = False
    note: str = ""


def parse_visible(value: str | None) -> Visible:
    """The ids that a value of ``CUDA_VISIBLE_DEVICES`` names. Never raises; what ends the list is told in ``note``."""
    if value is None:
        return Visible(everything=True)
    if not value.strip():
        return Visible(note="it is empty, which hides every GPU")
    ids: list[VisibleId] = []
    for text in (part.rstrip() for part in value.split(",")):
        found = _parse_id(text)
        if found is None:
            return Visible(tuple(ids), note=f"the list ends at {text!r}, which names no GPU")
        if ids and found.kind != ids[0].kind:
            return Visible(tuple(ids), note=f"the list ends at {text!r}: ordinals, GPU and MIG names cannot be mixed")
        if any(_same(found, known) for known in ids):
            return Visible(note=f"{text!r} is repeated, which hides every GPU")
        ids.append(found)
    return Visible(tuple(ids))


def _parse_id(text: str) -> VisibleId | None:
    if match := _MIG_PATH.match(text):
        return VisibleId("mig-path", text, uuid=match[1], instance=(int(match[2]), int(match[3])))
    if _MIG.match(text):
        return VisibleId("mig", text, uuid=text)
    if _GPU.match(text):
        return VisibleId("gpu", text, uuid=text)
    match = _ORDINAL.match(text.lstrip())
    if match is None or int(match[0]) < 0:
        return None
    return VisibleId("ordinal", text, ordinal=int(match[0]))


def _same(one: VisibleId, other: VisibleId) -> bool:
    return (one.ordinal, one.uuid.lower(), one.instance) == (other.ordinal, other.uuid.lower(), other.instance)


def resolve(visible: Visible, cards: Sequence[Card]) -> tuple[tuple[Card, ...], str]:
    """The cards that the ids mean, in CUDA's order, and a note; ``cards`` must be in CUDA's order if ids are ordinals.

    Raises:
        VisibilityError: a shortened UUID fits several cards.
    """
    if visible.everything:
        return tuple(cards), ""
    chosen: list[Card] = []
    for one in visible.ids:
        card = _find(one, cards)
        if card is None:
            return tuple(chosen), f"the list ends at {one.text!r}: there is no such GPU"
        if card in chosen:
            return (), f"{one.text!r} names a GPU for the second time, which hides every GPU"
        chosen.append(card)
    return tuple(chosen), visible.note


def _find(one: VisibleId, cards: Sequence[Card]) -> Card | None:
    if one.kind == "ordinal":
        return cards[one.ordinal] if one.ordinal is not None and one.ordinal < len(cards) else None
    if one.kind == "gpu":
        return _unique(one, cards)
    instances = [instance for card in cards for instance in card.instances]
    if one.kind == "mig":
        return _unique(one, instances) or _unique(dataclasses.replace(one, uuid=f"GPU-{one.uuid[4:]}"), cards)
    return _unique(one, [i for i in instances if i.instance == one.instance], "parent")


def _unique(one: VisibleId, cards: Sequence[Card], field: str = "uuid") -> Card | None:
    found = [card for card in cards if getattr(card, field).lower().startswith(one.uuid.lower())]
    if len(found) > 1:
        matches = ", ".join(card.uuid for card in found)
        raise VisibilityError(
            f"{_VARIABLE} names {one.text!r}, which fits {len(found)} GPUs: {matches}; write more of the UUID",
            variables={_VARIABLE: one.text},
        )
    return found[0] if found else None
