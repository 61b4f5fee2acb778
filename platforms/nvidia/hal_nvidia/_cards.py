"""Cards: facts about GPUs as their source states them, before anything is known about visibility."""

from __future__ import annotations

from hal_ops import record

__all__ = ["Card", "Reading", "plural"]


@record(frozen=True, kw_only=True)
class Card:
    """One GPU or MIG instance. What the source does not tell is None or empty.

    ``position`` is the source's own ordinal; ``mig_enabled`` cards run nothing themselves, their ``instances`` do.
    ``instance`` is (GPU instance, compute instance) of a MIG instance; ``problem`` says why the card cannot be used.
    """

    position: int
    uuid: str = ""
    pci: str = ""
    name: str = ""
    capability: tuple[int, int] | None = None
    memory: int | None = None
    multiprocessors: int | None = None
    integrated: bool | None = None
    mig_enabled: bool = False
    instances: tuple[Card, ...] = ()
    instance: tuple[int, int] | None = None
    parent: str = ""
    problem: str = ""

    def like(self, other: Card) -> bool:
        """Whether both have the same facts, so that it does not matter which of them an ordinal means."""
        return _facts(self) == _facts(other)


def _facts(card: Card) -> tuple[object, ...]:
    shared = (card.name, card.capability, card.memory, card.multiprocessors, card.problem, card.mig_enabled)
    return (*shared, tuple(_facts(instance) for instance in card.instances))


@record(frozen=True, kw_only=True)
class Reading:
    """What one source said. ``ordered``: the cards are the visible ones already, in CUDA's order."""

    source: str
    cards: tuple[Card, ...]
    driver: str = ""
    cuda: str = ""
    ordered: bool = False
    untold: tuple[str, ...] = ()


def plural(count: int, noun: str) -> str:
    """``"1 GPU"``, ``"8 GPUs"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
