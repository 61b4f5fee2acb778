"""Forced choices: what asks for a kernel or library, and which of them is heard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from hal._eligibility import Circumstances
from hal._registry import Registry
from hal._settings import Settings
from hal.errors import UnknownKernelError, UnknownOpError
from hal_ops import Op, record

if TYPE_CHECKING:
    from hal._lock import Locked

__all__ = ["Forced", "check_argument", "check_names", "forced_kernels", "wrong_names"]


@record(frozen=True)
class Forced:
    """A kernel or library that something asks for, and what does."""

    name: str
    source: str


def forced_kernels(
    op: Op, phases: tuple[str, ...], kernel: Any, lock: Locked | None, around: Circumstances
) -> dict[str, Forced]:
    """Phase to what forces it, by precedence."""
    layers = [
        _from_argument(op, kernel),
        _from_settings(op, around.settings, "hal.override"),
        {p: Forced(name, f"lock file {around.settings['lock']}") for p, name in (lock.kernels if lock else {}).items()},
        _from_settings(op, around.settings, "variable"),
        _from_settings(op, around.settings, "config file"),
    ]
    forced: dict[str, Forced] = {}
    for layer in reversed(layers):
        for phase, choice in layer.items():
            around.registry.check_name(choice.name, op.name, choice.source)
            _apply(forced, choice, phase, op, phases, around.registry)
    return forced


def _apply(
    forced: dict[str, Forced], choice: Forced, phase: str, op: Op, phases: tuple[str, ...], registry: Registry
) -> None:
    """Let a choice force its phases: a library all of them, a single kernel its own."""
    exact = registry.kernels.get(choice.name)
    if phase != "*" and exact is not None and exact.phase != phase:
        raise UnknownKernelError(
            f"{choice.source} asks for {choice.name!r} in the {phase} phase; it is a kernel of {exact.phase}",
            name=choice.name,
        )
    for target in op.phases if phase == "*" else (phase,):
        if target in phases and (exact is None or exact.phase == target):
            forced[target] = choice


def check_argument(op: Op, asked: Collection[str], kernel: Any, registry: Registry) -> None:
    """Make sure that a call's own argument forces nothing but phases that the call asks for. Settings hold for many calls,
    and what they say of other phases is for others.

    Raises:
        UnknownKernelError: with the phases that are asked for.
    """
    has = f"the request has only {' and '.join(p for p in op.phases if p in asked)}"
    for phase, choice in _from_argument(op, kernel).items():
        registry.check_name(choice.name, op.name, choice.source)
        exact = registry.kernels.get(choice.name)
        meant = exact.phase if exact is not None and phase == "*" else phase
        if meant not in ("*", *asked):
            what = f"{choice.name!r}, a kernel of {meant}" if phase == "*" else f"{choice.name!r} in the {meant} phase"
            raise UnknownKernelError(
                f"{choice.source} asks for {what}; {has}. Name a kernel or library for that, or ask for {meant} too "
                "(phases=)",
                name=choice.name,
            )


def _from_argument(op: Op, kernel: Any) -> dict[str, Forced]:
    if kernel is None:
        return {}
    pairs = kernel if isinstance(kernel, Mapping) else {"*": kernel}
    for phase in pairs:
        if phase != "*" and phase not in op.phases:
            raise UnknownKernelError(
                f"kernel={kernel!r}: op {op.name} has no phase {phase!r}; it has {', '.join(op.phases)}"
            )
    return {phase: Forced(str(name).strip().lower(), f"argument kernel={kernel!r}") for phase, name in pairs.items()}


def _from_settings(op: Op, settings: Settings, source: str) -> dict[str, Forced]:
    keys = {f"op_{op.name}": "*", op.name: "*", **{f"{op.name}_{p}": p for p in op.phases}}
    found = {}
    for key, phase in keys.items():
        value = settings.value(key)
        if value.value is not None and value.source.startswith(source):
            found[phase] = Forced(value.value, value.source)
    return found


def check_names(settings: Settings, registry: Registry) -> None:
    """Make sure that every op that a setting is about, and every kernel that one disables, is known.

    Raises:
        UnknownOpError, UnknownKernelError: with the nearest match.
    """
    for key in settings.op_keys():
        try:
            registry.op(key.removeprefix("op_"))
        except UnknownOpError as error:
            text = f"{settings.value(key).source}: {error}"
            raise UnknownOpError(text, name=error.name, known=error.known) from None
    disabled = settings.value("disable")
    for name in disabled.value:
        registry.check_known(name, disabled.source)


def wrong_names(settings: Settings, registry: Registry) -> list[str]:
    """Every name that a setting forces or disables and that no kernel, library or op of that kind has, in words."""
    wrong = [_no_op(key, settings, registry) for key in settings.op_keys()]
    for op in registry.ops.values():
        for source in ("hal.override", "variable", "config file"):
            for phase, choice in _from_settings(op, settings, source).items():
                wrong.append(_refusal(_check, choice, phase, op, op.phases, registry))
    disabled = settings.value("disable")
    wrong += [_refusal(registry.check_known, name, disabled.source) for name in disabled.value]
    return [text for text in dict.fromkeys(wrong) if text]


def _no_op(key: str, settings: Settings, registry: Registry) -> str:
    text = _refusal(registry.op, key.removeprefix("op_"))
    return text and f"{settings.value(key).source}: {text}"


def _check(choice: Forced, phase: str, op: Op, phases: tuple[str, ...], registry: Registry) -> None:
    registry.check_name(choice.name, op.name, choice.source)
    _apply({}, choice, phase, op, phases, registry)


def _refusal(ask: Callable[..., Any], *arguments: Any) -> str:
    try:
        ask(*arguments)
    except (UnknownKernelError, UnknownOpError) as error:
        return str(error)
    return ""
