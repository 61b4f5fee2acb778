"""From all cards to the visible ones in CUDA's order.

NVML counts in PCI order; CUDA puts the fastest first unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. Where cards differ, an
ordinal means a card only once the driver has named it by UUID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hal import Evidence
from hal_nvidia._cards import Card, Reading, plural
from hal_nvidia._driver import read_driver
from hal_nvidia._system import SourceError, System
from hal_nvidia._visible import Visible, parse_visible, resolve

__all__ = ["visible_cards"]

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_AMBIGUOUS = "which card CUDA calls {ordinal} is not known here ({names}): set CUDA_DEVICE_ORDER=PCI_BUS_ID"


def visible_cards(
    reading: Reading, environ: Mapping[str, str], system: System
) -> tuple[tuple[Card, ...], list[Evidence]]:
    """The visible cards in CUDA's order, and what was learnt on the way.

    Raises:
        VisibilityError: a shortened UUID in ``CUDA_VISIBLE_DEVICES`` fits several GPUs.
    """
    if reading.ordered:
        return reading.cards, []
    visible = parse_visible(environ.get(_VARIABLE))
    if _order_matters(visible, reading.cards, environ):
        return _ask_for_order(visible, reading, environ, system)
    chosen, note = resolve(visible, reading.cards)
    shown, mig_note = _one_instance(chosen)
    return shown, _evidence(environ, shown, note, mig_note)


def _evidence(environ: Mapping[str, str], shown: Sequence[Card], note: str, mig_note: str) -> list[Evidence]:
    found = [Evidence("MIG", mig_note, found=len(shown))] if mig_note else []
    if _VARIABLE in environ:
        text = f"{environ[_VARIABLE]!r} shows {plural(len(shown), 'device')}" + (f": {note}" if note else "")
        found.append(Evidence(_VARIABLE, text, found=len(shown)))
    return found


def _order_matters(visible: Visible, cards: Sequence[Card], environ: Mapping[str, str]) -> bool:
    by_ordinal = visible.everything or any(one.kind == "ordinal" for one in visible.ids)
    pci_order = environ.get("CUDA_DEVICE_ORDER", "").strip().upper() == "PCI_BUS_ID"
    return by_ordinal and not pci_order and not all(card.like(cards[0]) for card in cards)


def _ask_for_order(
    visible: Visible, reading: Reading, environ: Mapping[str, str], system: System
) -> tuple[tuple[Card, ...], list[Evidence]]:
    try:
        asked = read_driver(system.ask_driver(environ), reading.driver)
    except SourceError as missing:
        cards, note = resolve(visible, [_nobody(i, reading.cards) for i in range(len(reading.cards))])
        text = f"cards differ, and the driver could not be asked which one it calls 0: {missing}"
        remedy = "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        unknown = Evidence("CUDA's order", text, found=len(cards), remedy=remedy)
        return cards, [unknown, *_evidence(environ, cards, note, "")]
    known = {key: card for whole in reading.cards for card in (whole, *whole.instances) for key in _keys(card)}
    cards = tuple(next((known[key] for key in _keys(card) if key in known), card) for card in asked.cards)
    text = f"cards differ; the driver names them as {', '.join(card.name for card in cards)}"
    return cards, [Evidence("CUDA's order", text, found=len(cards)), *_evidence(environ, cards, "", "")]


def _keys(card: Card) -> tuple[str, ...]:
    """What identifies a card in both sources, the surer one first. The driver writes MIG UUIDs as GPU UUIDs."""
    return tuple(key for key in (card.uuid.lower().partition("-")[2], card.pci) if key)


def _nobody(ordinal: int, cards: Sequence[Card]) -> Card:
    """A card that is there, with no facts: better than another card's."""
    names = " or ".join(dict.fromkeys(card.name for card in cards))
    return Card(position=ordinal, problem=_AMBIGUOUS.format(ordinal=ordinal, names=names))


def _one_instance(chosen: Sequence[Card]) -> tuple[tuple[Card, ...], str]:
    """CUDA enumerates at most one MIG instance, and no whole GPU beside it (MIG user guide, "Device Enumeration")."""
    whole = [card for card in chosen if not card.mig_enabled and card.instance is None]
    instances = [i for card in chosen for i in (card.instances if card.mig_enabled else (card,)) if i.instance]
    if instances:
        left_out = len(instances) - 1 + len(whole)
        text = f"CUDA shows one MIG instance and nothing beside it: {instances[0].name} ({instances[0].uuid})"
        return (instances[0],), text + (f"; {left_out} left out" if left_out else "")
    idle = ", ".join(card.name for card in chosen if card.mig_enabled)
    return tuple(whole), f"MIG is on, but no instance was made: {idle} cannot be used" if idle else ""
