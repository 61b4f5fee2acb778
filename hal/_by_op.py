"""``ByOp``: declarations that wait until their op is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

from hal._kernel import Kernel
from hal.errors import RegistrationError
from hal_ops import Op, resolve_target

__all__ = ["ByOp"]

T = TypeVar("T", Kernel, Op)


class ByOp(Generic[T]):
    """What ``Platform.ops`` or ``Platform.kernels`` may return, so that declarations are loaded by op.

    ``targets`` maps each ``"module:attribute"``, an ``Op`` or a sequence of ``Op`` or ``Kernel``, to the ops that it is
    about. A target is imported when one of these is first asked for; iterating imports all of them.

    ``platforms`` promises that all of its kernels are for devices of these platforms alone. Where nothing but HAL's own
    kernels can serve a device, they are then loaded when somebody looks at all candidates.
    """

    def __init__(self, targets: Mapping[str, Collection[str]], *, platforms: Collection[str] = ()) -> None:
        for name, names in (*targets.items(), ("platforms", platforms)):
            if isinstance(names, str):
                raise TypeError(f"{name}: give a tuple of names, not the string {names!r}")
        self._targets = dict(targets)
        self._platforms = frozenset(platforms)

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops, each once."""
        return tuple(dict.fromkeys(op for ops in self._targets.values() for op in ops))

    def may_serve(self, platform: str) -> bool:
        """Whether something of it could be for devices of ``platform``."""
        return not self._platforms or platform in self._platforms

    def of(self, wanted: Collection[str] | None = None) -> Iterator[T]:
        """The declarations of the ops that are wanted; None means all.

        Raises:
            ImportError, AttributeError: a target is not there.
            RegistrationError: a target declares something of an op that it is not listed for, or for other platforms than
                were promised.
        """
        for target, ops in self._targets.items():
            if wanted is None or any(op in wanted for op in ops):
                yield from (d for d in self._declared(target) if wanted is None or _op_of(d) in wanted)

    def __iter__(self) -> Iterator[T]:
        return self.of()

    def _declared(self, target: str) -> tuple[T, ...]:
        found = resolve_target(target)
        declared = (found,) if isinstance(found, Op) else tuple(found)
        for one in declared:
            if _op_of(one) not in self._targets[target]:
                raise RegistrationError(
                    f"{target} holds {one!r}, and is listed for {', '.join(self._targets[target])} alone"
                )
            if self._platforms and not _is_for(self._platforms, one):
                promised = ", ".join(sorted(self._platforms))
                raise RegistrationError(f"{target} holds {one!r}, which is not for {promised} alone, as was promised")
        return declared


def _op_of(declared: Kernel | Op) -> str:
    return declared.name if isinstance(declared, Op) else declared.op


def _is_for(platforms: frozenset[str], declared: Kernel | Op) -> bool:
    mine = () if isinstance(declared, Op) else declared.platforms
    return bool(mine) and platforms.issuperset(mine)
