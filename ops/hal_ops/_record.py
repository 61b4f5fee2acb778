"""``record``: dataclasses that are cheap to define, most of them frozen.

``dataclasses.dataclass(frozen=True)`` compiles up to seven methods from text for each class, half a millisecond a time;
for the sixty classes behind a first handle that was a third of its time. The classes made here are dataclasses all the
same (``fields``, ``replace`` and ``asdict`` work), but share methods that look at the fields when they are called, and
``dataclasses`` reads their annotations when it is first asked about them: that took a tenth of a millisecond a class.
Making an instance takes about a microsecond more, so what is made in a loop on the hot path is no record.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, kw_only: bool = False) -> Callable[[type], type]:
        """``dataclasses.dataclass(frozen=..., ...)``; a method that the class defines itself stays, as it does there."""
        return lambda cls: _made(cls, kw_only, frozen)


_lock = threading.RLock()


class _Annotated:
    """What counts here of a field that is no more than an annotation, perhaps with a default; a ``Field`` costs more."""

    default_factory, repr, compare, hash = dataclasses.MISSING, True, True, None

    def __init__(self, name: str, default: Any, kw_only: bool) -> None:
        self.name, self.default, self.kw_only = name, default, kw_only


class _Fields:
    """What the shared methods need to know of a class."""

    def __init__(self, cls: type, fields: tuple[Any, ...]) -> None:
        self.positional = tuple(f.name for f in fields if not f.kw_only)
        self.names = frozenset(f.name for f in fields)
        self.defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        self.factories: dict[str, Callable[[], Any]] = {
            f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING
        }
        self.shown = tuple(f.name for f in fields if f.repr)
        self.compared = tuple(f.name for f in fields if f.compare)
        self.hashed = tuple(f.name for f in fields if (f.compare if f.hash is None else f.hash))
        self.finished = hasattr(cls, "__post_init__")


def _made(cls: type, kw_only: bool, frozen: bool) -> type:
    mine: Any = cls
    fields = _plain_fields(cls, kw_only, frozen)
    if fields is None:
        _process(cls, kw_only, frozen)
        fields = dataclasses.fields(mine)
    mine.__record__ = _Fields(cls, fields)
    setattr(cls, "__match_args__", mine.__record__.positional)  # noqa: B010 - Python's own name, which mypy would keep
    if "__init__" not in cls.__dict__:
        mine.__signature__ = _Signature()
    for name, method in (_METHODS if frozen else _CHANGEABLE).items():
        if cls.__dict__.get(name) is None:  # __hash__ is None where the class defines __eq__ alone
            setattr(cls, name, method)
    return cls


def _process(cls: type, kw_only: bool, frozen: bool) -> None:
    """Let ``dataclasses`` read the class."""
    mine: Any = cls
    # being frozen is what costs, so it is only claimed, afterwards; Python insists where a base claims it already
    derived = any(b.__dataclass_params__.frozen for b in mine.__mro__[1:] if hasattr(b, "__dataclass_params__"))
    dataclasses.dataclass(init=False, repr=False, eq=False, frozen=frozen and derived, kw_only=kw_only)(cls)
    mine.__dataclass_params__.frozen = frozen


def _plain_fields(cls: type, kw_only: bool, frozen: bool) -> tuple[Any, ...] | None:
    """The fields of a class that is simple enough for ``dataclasses`` to read it later; None of any other."""
    mine: Any = cls
    texts = [a if isinstance(a, str) else "" for a in mine.__annotations__.values()]
    if any(map(_has_fields, cls.__mro__[1:])) or any(
        not text or "InitVar" in text or "KW_ONLY" in text for text in texts
    ):
        return None
    names = [n for n, text in mine.__annotations__.items() if "ClassVar" not in text.partition("[")[0]]
    written = {n: value for n, value in vars(cls).items() if isinstance(value, dataclasses.Field)}
    given = {n: vars(cls).get(n, dataclasses.MISSING) for n in names}
    if not written.keys() <= given.keys() or any(type(value).__hash__ is None for value in given.values()):
        return None  # which is an error, in the words of dataclasses
    fields = {n: written[n] if n in written else _Annotated(n, value, kw_only) for n, value in given.items()}
    for name, field in written.items():
        field.name, field.kw_only = name, kw_only if field.kw_only is dataclasses.MISSING else field.kw_only
        delattr(cls, name)
        if field.default is not dataclasses.MISSING:
            setattr(cls, name, field.default)
    for attribute in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, attribute, _Later(attribute, cls, (kw_only, frozen), written))
    return tuple(fields.values())


def _has_fields(base: Any) -> bool:
    """Whether a base class has fields to inherit; asked of a record, ``dataclasses`` would read it."""
    return bool(base.__record__.names) if hasattr(base, "__record__") else hasattr(base, "__dataclass_fields__")


class _Later:
    """Stands for what ``dataclasses`` knows of a class, until that is first looked at."""

    def __init__(self, name: str, cls: type, how: tuple[bool, bool], written: dict[str, Any]) -> None:
        self.name, self.cls, self.how, self.written = name, cls, how, written

    def __get__(self, instance: Any, owner: type) -> Any:
        with _lock:
            if vars(self.cls)[self.name] is self:
                for name, field in self.written.items():
                    setattr(self.cls, name, field)
                _process(self.cls, *self.how)
        return vars(self.cls)[self.name]


def _init(self: Any, /, *args: Any, **kwargs: Any) -> None:
    fields: _Fields = self.__record__
    values = self.__dict__
    values.update(fields.defaults)
    if args:
        values.update(zip(fields.positional, args, strict=False))
        if len(args) > len(fields.positional) or not kwargs.keys().isdisjoint(fields.positional[: len(args)]):
            _refuse(self, args, kwargs)
    values.update(kwargs)
    for name, make in fields.factories.items():
        if name not in values:
            values[name] = make()
    if values.keys() != fields.names:
        _refuse(self, args, kwargs)
    if fields.finished:
        self.__post_init__()


def _refuse(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise the TypeError that Python has for such arguments."""
    cls = type(self)
    try:
        cls.__signature__.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{cls.__qualname__}: {error}") from None


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__record__.shown)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: Any) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    mine, theirs = self.__dict__, other.__dict__
    return all(mine[name] is theirs[name] or mine[name] == theirs[name] for name in self.__record__.compared)


def _hash(self: Any) -> int:
    return hash(tuple(map(self.__dict__.__getitem__, self.__record__.hashed)))


def _setattr(self: Any, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


_METHODS: dict[str, Any] = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _eq,
    "__hash__": _hash,
    "__setattr__": _setattr,
    "__delattr__": _delattr,
}
_CHANGEABLE: dict[str, Any] = {"__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": None}


class _Signature:
    """The parameters of a record class, for ``inspect`` and the docs, put together when they are asked for."""

    def __get__(self, instance: Any, owner: type) -> Any:
        import inspect
        import typing

        empty = inspect.Parameter.empty
        try:
            types = typing.get_type_hints(owner)
        except NameError:  # a name that is imported for type checkers alone: the text has to do
            types = {}
        parameters = []
        for f in sorted(dataclasses.fields(owner), key=lambda f: bool(f.kw_only)):
            kind = inspect.Parameter.KEYWORD_ONLY if f.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            made = f.default_factory is not dataclasses.MISSING
            default = "<factory>" if made else empty if f.default is dataclasses.MISSING else f.default
            parameters.append(inspect.Parameter(f.name, kind, default=default, annotation=types.get(f.name, f.type)))
        return inspect.Signature(parameters, return_annotation=None)
