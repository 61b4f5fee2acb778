"""Make the tables of ``docs/support.md``: kernel, arch and feature, and how each is known.

The tables are written between two comments of the page, out of what the installed distributions declare
(``hal.Kernel.evidence``); nothing of it is typed by hand. A kernel that declares a feature on an arch shows the word
that it declares for that arch: ``run``, ``emulated``, ``compiled`` or ``claimed``. Features are found as the
conformance kit finds them: some corner of the declaration, as the arch admits it, turns the feature on.

``--check`` writes nothing, and exits with 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hal
from hal import _plugins
from hal._registry import Registry
from hal.errors import RegistrationError
from hal.testing import corners
from hal.testing._wins import simulated_homes
from hal_ops import Op, Request

__all__ = ["WORDS", "Row", "render", "rows", "tables"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
BEGIN = "<!-- Made by tools/support_doc.py from what kernels declare. Change those, and run it. -->"
END = "<!-- The end of what tools/support_doc.py makes. -->"

WORDS = ("run", "emulated", "compiled", "claimed")
"""How a claim is known, the strongest first."""

_NEWEST = hal.Version.parse("99")
_SHORT = {
    "causal": "no causality",
    "softmax_scale": "scale",
    "kv_scale": "scale a head",
    "return_lse": "LSE",
    "needs_grad": "gradients",
    "max_q_len": "drafts",
    "v_head_dim": "unequal dims",
    "kv_dtype": "FP8 cache",
    "weight_dtype": "float32 weight",
    "weight_offset": "weight + 1",
    "table_dtype": "tables in dtype",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel on archs for which it declares the same. ``features`` are those that it has there."""

    kernel: hal.Kernel
    archs: tuple[str, ...]
    word: str
    features: frozenset[str]


def render(page: str, registry: Registry | None = None) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: the comments that the tables belong between are not there, once each.
    """
    if (page.count(BEGIN), page.count(END)) != (1, 1):
        raise ValueError(f"the page must hold each of these lines once: {BEGIN} {END}")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    made = "\n".join(tables(registry or _plugins.registry()))
    return f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}"


def tables(registry: Registry) -> Iterator[str]:
    """The lines of all tables, an op and phase each; attention comes first."""
    ops = sorted(registry.ops.values(), key=lambda op: (op.name != "attention", op.name))
    for index, (op, phase) in enumerate([(each, phase) for each in ops for phase in each.phases]):
        found = [row for kernel in registry.candidates(op.name, phase) for row in rows(kernel, op, registry)]
        features = [f for f in _features(op, phase) if any(f in row.features for row in found)]
        yield from ["", ""][: 1 if index else 0]
        yield f"### `{op.name}`" + (f", {phase}" if len(op.phases) > 1 else "")
        yield ""
        yield _line(["kernel", "archs", *(_SHORT.get(f, f.replace("_", " ")) for f in features), "formats"])
        yield _line(["---"] * (len(features) + 3))
        for row in found:
            cells = [row.word if f in row.features else "-" for f in features]
            yield _line([f"`{row.kernel.name}`", f"{', '.join(row.archs)}: {row.word}", *cells, _formats(row.kernel)])


def rows(kernel: hal.Kernel, op: Op, registry: Registry) -> Iterator[Row]:
    """What a kernel declares, archs of which it says the same in one row, in the order in which it names them."""
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for arch, word, features in _declared(kernel, op, registry):
        groups.setdefault((word, features), []).append(arch)
    for (word, features), archs in groups.items():
        yield Row(kernel, tuple(archs), word, features)


def _declared(kernel: hal.Kernel, op: Op, registry: Registry) -> Iterator[tuple[str, str, frozenset[str]]]:
    homes = {home.arch.name: _newest(home) for home in simulated_homes(kernel, registry)} if kernel.platforms else {}
    rest = kernel.evidence.get("*", "claimed")
    same = _on(kernel, op, None) if kernel.check is None else None
    named = _named(kernel, registry)
    for arch in named:
        yield arch, kernel.evidence.get(arch, rest), _on(kernel, op, homes.get(arch)) if same is None else same
    if _is_open(kernel):
        where = f"every {'other ' if named else ''}{_where(kernel)}"
        yield where, rest, _on(kernel, op, None) if same is None else same


def _named(kernel: hal.Kernel, registry: Registry) -> list[str]:
    """Archs that the declaration names, and admits: evidence may speak of more."""
    listed = [arch for archs in kernel.platforms.values() for arch in archs.only if "*" not in arch]
    return [a for a in dict.fromkeys([*listed, *kernel.evidence]) if a != "*" and _admits(kernel, a, registry)]


def _admits(kernel: hal.Kernel, name: str, registry: Registry) -> bool:
    for platform, archs in kernel.platforms.items():
        try:
            arch = registry.platforms[platform].parse_arch(name)
        except (KeyError, ValueError):
            continue  # the platform is not installed, or the arch is another vendor's
        if not archs.refusal(arch, registry.platforms[platform].parse_arch):
            return True
    return not kernel.platforms


def _newest(home: hal.Device) -> hal.Device:
    return dataclasses.replace(home, runtime=_NEWEST, driver=_NEWEST)


def _is_open(kernel: hal.Kernel) -> bool:
    """Whether the declaration admits archs that it does not name."""
    named = [archs for archs in kernel.platforms.values() if archs.only and not any("*" in a for a in archs.only)]
    return not named or len(named) < len(kernel.platforms)


def _where(kernel: hal.Kernel) -> str:
    words = [f"{platform} {archs.words()}".removesuffix(" any") for platform, archs in kernel.platforms.items()]
    return " or ".join(words) or "arch"


def _on(kernel: hal.Kernel, op: Op, device: hal.Device | None) -> frozenset[str]:
    """Features that some request which the kernel admits turns on, with the newest of all that it needs."""
    names = ["torch", "triton", *(n for needs in kernel.needs for n in needs.names())]
    with hal.simulate(libraries=dict.fromkeys(names, str(_NEWEST))):
        try:
            requests = corners(kernel, op=op, device=device)
        except RegistrationError:
            # Its check() refuses whatever is asked: what is in the way is this machine's, such as a variable.
            requests = corners(kernel, op=op)
    return frozenset(f for f in _features(op, kernel.phase) if any(_is_on(f, r) for r in requests))


def _features(op: Op, phase: str) -> list[str]:
    """Fields that are features of the op, and the requirements that tables should tell."""
    told = ("causal", "kv_dtype", "max_q_len", "v_head_dim")
    rules: Mapping[str, object] = op.request.rules()
    return [
        n for n in rules if op.request.rules()[n].applies(phase) and (not op.request.rules()[n].required or n in told)
    ]


def _is_on(feature: str, request: Request) -> bool:
    value = getattr(request, feature)
    if feature == "causal":
        return value is False
    if feature == "kv_dtype":
        return str(value).startswith("float8")
    if feature == "max_q_len":
        return bool(value > 1)
    if feature == "v_head_dim":
        return bool(value != getattr(request, "head_dim", value))
    return not request.is_neutral(feature)


def _formats(kernel: hal.Kernel) -> str:
    constraint = kernel.fields.get("dtype")
    return "any" if constraint is None else constraint.allowed()


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="make the tables of docs/support.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    given = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = render(before)
    if given.check:
        print(
            "docs/support.md is up to date" if before == after else "docs/support.md is stale: run this without --check"
        )
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
