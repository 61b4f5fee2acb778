"""``InProcess``: what stands for functions and memory of this process, so that a copy of it is the thing itself."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, TypeVar

__all__ = ["InProcess"]

T = TypeVar("T", bound="InProcess")


class InProcess:
    """Copied, also in depth, as part of a module or a config, it stays one: plans know their handle by identity."""

    __slots__ = ()
    _instead: ClassVar[str] = ""
    """What to do in the place of pickling it."""

    def __copy__(self: T) -> T:
        return self

    def __deepcopy__(self: T, memo: Any) -> T:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"cannot pickle {self!r}: it holds functions and memory of this process; {self._instead}. A module keeps it "
            "out of its state with __getstate__"
        )
