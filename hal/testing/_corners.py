"""Corners: requests worth testing, generated from what a kernel declares and from nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

from hal import _eligibility, _plugins
from hal._device import Device
from hal._kernel import Kernel
from hal.errors import RegistrationError
from hal.testing._sampling import LARGEST, admitted, bounded, centred, size, usual
from hal_ops import Op, Request, is_fp8

__all__ = ["corners", "find_kernel", "request_id"]

COMBINATIONS = 8
_STARTS = 256
_UNBUILDABLE = 1 << 20

Given = dict[str, Any]


def corners(
    kernel: Kernel | str, *, op: Op | None = None, device: Device | None = None, limit: int | None = None
) -> list[Request]:
    """Requests that a kernel must serve, by its own declaration.

    The first is plain. Then each declared field takes each of the values that its constraint calls corners (see
    ``Constraint.corners``), one field at a time, all fields once before any field twice. Permissions are granted over FP8
    caches, and a seeded random handful of combinations follows. The order is the same in every process. Open declarations
    are sampled with small sizes.

    Args:
        kernel: a declaration, or the name of a registered one. op: its op, if that is not registered.
        device: also keep to what the kernel's own ``check()`` admits there.
        limit: at most this many.

    Raises:
        RegistrationError: no request at all meets the declaration; the text names the fields that clash.
    """
    kernel = find_kernel(kernel)
    space = _Space(kernel, op or _plugins.registry().op(kernel.op), device)
    found: dict[Request, None] = {}
    for given in space.walk():
        request = space.build(given)
        if request is not None:
            found.setdefault(request)
        if limit is not None and len(found) >= limit:
            break
    return list(found)


def find_kernel(kernel: Kernel | str) -> Kernel:
    """The kernel itself, or the registered one of that name.

    Raises:
        UnknownKernelError: with the nearest match.
    """
    if isinstance(kernel, Kernel):
        return kernel
    registry = _plugins.registry()
    if kernel not in registry.kernels:
        registry.check_known(kernel, "hal.testing")
        mine = ", ".join(sorted(k.name for k in registry.kernels.values() if k.library == kernel))
        raise RegistrationError(f"{kernel!r} is a library; name one of its kernels: {mine}", name=kernel)
    return registry.kernels[kernel]


def request_id(request: Request) -> str:
    """A readable name of a request: its op's own fields, each that is not at its default, as ``field=value``."""
    bare = {f.name: getattr(request, f.name) for f in dataclasses.fields(request) if _needed(f)}
    try:
        plain = type(request)(**bare)
    except ValueError:
        plain = request
    permissions = [n for n in request.derived if n in request.__dataclass_fields__]
    computed = {n for n, rule in request.rules().items() if callable(rule.neutral)}

    def said(name: str) -> bool:
        other = not request.is_neutral(name) if name in computed else getattr(request, name) != getattr(plain, name)
        return name in bare or other

    names = [name for name in (*request.rules(), *permissions) if said(name)]
    return ",".join(f"{name}={_short(getattr(request, name))}" for name in names)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(_short(v) for v in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class _Space:
    """The requests that one kernel admits. A point of it is a dict of constructor arguments: defaults stay unsaid, so
    that fields which follow others (``v_head_dim``, ``softmax_scale``) do follow."""

    def __init__(self, kernel: Kernel, op: Op, device: Device | None) -> None:
        self.kernel = kernel
        self.op = op
        self.device = device
        self.members = {f.name: f for f in dataclasses.fields(op.request)}
        self.fixed: Given = {"phases": (kernel.phase,)} if "phases" in self.members else {}
        rules = op.request.rules()
        self.varied = tuple(n for n in kernel.fields if n not in rules or rules[n].applies(kernel.phase))
        self.own = tuple(n for n in self.varied if n in self.members)

    def build(self, given: Given) -> Request | None:
        """The request, or None where the op's contract knows none."""
        try:
            return self.op.request(**self.fixed, **given)
        except ValueError:
            return None

    def refused(self, request: Request) -> list[str]:
        """Names of the fields that stand in the way of a request."""
        return self.undeclared(request) or self.unchecked(request)

    def undeclared(self, request: Request) -> list[str]:
        """Names of the fields that the declaration refuses, or that are still open."""
        rules = request.rules()
        refused = [r.field for r in _eligibility._fields(self.kernel, request)]
        return refused + [n for n in request.open_fields() if rules[n].applies(self.kernel.phase)]

    def unchecked(self, request: Request) -> list[str]:
        """Names of the fields that the kernel's own ``check`` refuses."""
        if self.kernel.check is None or self.device is None:
            return []
        return [r.field for r in self.kernel.check(request, self.device)]

    def score(self, given: Given) -> tuple[int, int]:
        """How far a point is from being admitted: by the declaration first, by ``check`` then; (0, 0) is in."""
        request = self.build(given)
        if request is None:
            return (_UNBUILDABLE, 0)
        undeclared = len(self.undeclared(request))
        return (undeclared, 0 if undeclared else len(self.unchecked(request)))

    def walk(self) -> Iterator[Given]:
        """The base, then one field at a time, then what that brings about in others, then combinations."""
        base = self.base()
        yield base
        rounds = [list(self.variations(base, name)) for name in self.varied]
        singles = [given for row in itertools.zip_longest(*rounds) for given in row if given is not None]
        yield from singles
        for given in singles:
            yield from self.dependent(base, given)
        for given in singles:
            yield from self.permitted(given)
        yield from self.combinations(base)

    def base(self) -> Given:
        """A plain point: defaults where they are admitted, values from the middle of the declaration elsewhere.

        Raises:
            RegistrationError: there is none.
        """
        names = [n for n, field in self.members.items() if _needed(field)]
        choices = [self.options(n, None) for n in names]
        best: Given = {}
        for values in itertools.islice(itertools.product(*choices), _STARTS):
            start = dict(zip(names, values, strict=True))
            found = self.repaired(start, frozenset())
            if found is not None:
                return found
            best = min(best or start, start, key=self.score)
        raise RegistrationError(self._nothing(best), name=self.kernel.name)

    def _nothing(self, nearest: Given) -> str:
        request = self.build(nearest)
        if request is None:
            why = f"{self.op.request.__name__} accepts none of the values tried; give its constraints samples"
        else:
            why = "; ".join(str(r) for r in _eligibility._fields(self.kernel, request)) or "its check() refuses"
            why = f"the nearest is {request_id(request)}, and there: {why}"
        return f"kernel {self.kernel.name!r} declares fields that no request meets: {why}"

    def repaired(self, given: Given, keep: frozenset[str]) -> Given | None:
        """The point moved, one field after another, until it is admitted; fields in ``keep`` stay."""
        score = self.score(given)
        while any(score):
            moves = list(self._moves(given, keep))
            scores = [self.score(move) for move in moves]
            if not moves or min(scores) >= score:
                return None
            score = min(scores)
            given = moves[scores.index(score)]
        return given

    def _moves(self, given: Given, keep: frozenset[str]) -> Iterator[Given]:
        request = self.build(given)
        wrong = () if request is None else self.refused(request)
        for name in sorted(self.own, key=lambda n: n not in wrong):
            if name not in keep:
                yield from ({**given, name: value} for value in self.options(name, request))
        for name in (n for n in wrong if n not in self.members):
            for value in self.options(name, request):
                yield from (p for p in self._products(given, value) if all(p.get(k) == given.get(k) for k in keep))

    def options(self, name: str, request: Request | None) -> tuple[Any, ...]:
        """Values of a field to try, the plainest first."""
        constraint = self.kernel.fields.get(name)
        kind = str(self.members[name].type) if name in self.members else "int"
        try:
            blank: Request = object.__new__(self.op.request) if request is None else request
            found = [] if constraint is None else list(constraint.corners(blank))
            found += [v for v in usual(kind) if self._worth_adding(name, found) and admitted(constraint, v, blank)]
        except AttributeError:
            # The constraint looks at a field that the request does not have yet: it has its say in repaired().
            found = list(usual(kind))
        return centred(bounded(list(dict.fromkeys(found))))

    def _worth_adding(self, name: str, found: list[Any]) -> bool:
        """Whether a constraint's own corners leave a field without a value that says something."""
        rule = self.op.request.rules().get(name)
        if rule is None or rule.required or callable(rule.neutral):
            return not found
        return all(v == rule.neutral for v in found)

    def variations(self, base: Given, name: str) -> Iterator[Given]:
        """The base with other values of one field; what must move along with it does."""
        request = self.build(base)
        for value in self.options(name, request):
            if name in self.members:
                found = self.repaired({**base, name: value}, frozenset({name}))
            else:
                found = self.with_derived(base, name, value)
            if found is not None:
                yield found

    def dependent(self, base: Given, moved: Given) -> Iterator[Given]:
        """Values that a constraint names only once another field has moved: a right window without causality."""
        before, after = self.build(base), self.build(moved)
        for name in self.own:
            if name not in moved or moved[name] == base.get(name):
                news = set(self.options(name, after)) - set(self.options(name, before))
                points = ({**moved, name: value} for value in sorted(news, key=repr))
                yield from (point for point in points if not any(self.score(point)))

    def permitted(self, moved: Given) -> Iterator[Given]:
        """Permissions that the declaration says nothing of, over an FP8 cache: the kernel may make use of them."""
        if is_fp8(moved.get("kv_dtype", "")):
            silent = [n for n in self.op.request.derived if n in self.members and n not in self.kernel.fields]
            yield from (point for n in silent if not any(self.score(point := {**moved, n: True})))

    def with_derived(self, base: Given, name: str, value: Any) -> Given | None:
        """A point whose property ``name`` has a value."""
        for given in self._products(base, value):
            request = self.build(given)
            if request is not None and getattr(request, name) == value and not self.refused(request):
                return given
        return None

    def _products(self, given: Given, value: Any) -> Iterator[Given]:
        """Points where a whole number is ``value`` times another: what properties such as a group size come from."""
        numbers = {n: v for n, v in given.items() if isinstance(v, int) and not isinstance(v, bool)}
        for field in numbers:
            for factor in dict.fromkeys((1, *numbers.values())):
                yield {**given, field: value * factor}

    def combinations(self, base: Given) -> Iterator[Given]:
        """A seeded handful of points where several fields vary at once, none of them large."""
        dice = random.Random(self.kernel.name)
        request = self.build(base)
        options = {n: self.options(n, request) for n in self.own}
        left = COMBINATIONS
        for _ in range(40 * COMBINATIONS):
            given = {**base, **{n: dice.choice(v) for n, v in options.items() if v and dice.random() < 0.5}}
            if left and size(given) <= max(size(base), LARGEST * 64) and not any(self.score(given)):
                left -= 1
                yield given
