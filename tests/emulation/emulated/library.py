"""A library in ``sys.modules`` whose functions have the kept signatures, and answer by emulation."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from emulated.signatures import Unread, functions

__all__ = ["Call", "Installed", "installed"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: the function, what the caller passed by name, and all arguments with defaults filled in."""

    function: str
    passed: Mapping[str, Any]
    arguments: Mapping[str, Any]


@dataclasses.dataclass
class Installed:
    """A library that is pretended to be there. ``calls`` are those of its functions, in order."""

    library: str
    version: str
    calls: list[Call] = dataclasses.field(default_factory=list)

    def called(self, function: str) -> list[Call]:
        """Calls of one function, by its bare or qualified name."""
        return [c for c in self.calls if function in (c.function, c.function.partition(":")[2])]


@contextlib.contextmanager
def installed(
    library: str,
    version: str,
    emulations: Mapping[str, Any],
    *,
    adapters: Iterable[str] = (),
    modules: Iterable[str | types.ModuleType] = (),
) -> Iterator[Installed]:
    """Pretend that a version of a library is importable.

    Args:
        library, version: of the kept signatures. Functions that this version lacks are absent from its modules.
        emulations: ``"name"`` (without module) to a function of the same parameters, or ``"Class"`` to a class whose
            methods of the kept names are watched. A kept function without an emulation raises when called.
        adapters: our modules that import the library: imported anew inside, and forgotten afterwards.
        modules: further modules that the library brings, empty or as given.
    """
    held = Installed(library, version)
    names = {*adapters, *(m if isinstance(m, str) else m.__name__ for m in modules)}
    tree = _modules(held, emulations)
    tree.update({m if isinstance(m, str) else m.__name__: _module(m) for m in modules})
    for name in [n for n in tree if "." in n]:
        _with_parents(name, tree)
    before = {name: sys.modules.get(name) for name in (*tree, *names)}
    for name in adapters:
        sys.modules.pop(name, None)
    sys.modules.update(tree)
    try:
        yield held
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None and name not in adapters:
                sys.modules[name] = module


def _module(given: str | types.ModuleType) -> types.ModuleType:
    return types.ModuleType(given) if isinstance(given, str) else given


def _modules(held: Installed, emulations: Mapping[str, Any]) -> dict[str, types.ModuleType]:
    tree: dict[str, types.ModuleType] = {}
    for function, signature in functions(held.library, held.version).items():
        place, _, name = function.partition(":")
        module = tree.setdefault(place, types.ModuleType(place))
        owner, _, method = name.rpartition(".")
        if owner:
            _watch_method(held, module, function, owner, method, signature, emulations)
        else:
            setattr(module, name, _spy(held, function, signature, emulations.get(name), bound=False))
    return tree


def _with_parents(name: str, tree: dict[str, types.ModuleType]) -> None:
    """Parent packages, which hold what their submodules define, as the real ones do."""
    child = tree[name]
    while "." in name:
        parent, _, last = name.rpartition(".")
        package = tree.setdefault(parent, types.ModuleType(parent))
        package.__path__ = []
        for key, value in vars(child).items():
            if not key.startswith("__") and not hasattr(package, key):
                setattr(package, key, value)
        setattr(package, last, tree[name])
        name = parent


def _watch_method(
    held: Installed,
    module: types.ModuleType,
    function: str,
    owner: str,
    method: str,
    signature: inspect.Signature,
    emulations: Mapping[str, Any],
) -> None:
    base = emulations.get(owner)
    if base is None:
        raise KeyError(f"{function} needs an emulation of the class {owner}")
    made = vars(module).get(owner)
    if made is None:
        made = type(owner, (base,), {"__module__": module.__name__})
        setattr(module, owner, made)
    setattr(made, method, _spy(held, function, signature, getattr(base, method), bound=True))


def _spy(
    held: Installed, function: str, signature: inspect.Signature, emulation: Callable[..., Any] | None, *, bound: bool
) -> Callable[..., Any]:
    def spy(*args: Any, **kwargs: Any) -> Any:
        own, args = (args[:1], args[1:]) if bound else ((), args)
        found = signature.bind(*args, **kwargs)
        passed = dict(found.arguments)
        found.apply_defaults()
        held.calls.append(Call(function, passed, dict(found.arguments)))
        if emulation is None:
            raise NotImplementedError(f"{function} of {held.library} {held.version} is called, and has no emulation")
        return emulation(*own, *found.args, **found.kwargs)

    spy.__name__ = function.rpartition(":")[2].rpartition(".")[2]
    me = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if bound else []
    visible = [p.replace(default=None) if isinstance(p.default, Unread) else p for p in signature.parameters.values()]
    plain = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in me]
    spy.__signature__ = inspect.Signature([*plain, *visible])  # type: ignore[attr-defined]
    return spy
