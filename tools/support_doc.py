"""Make the tables of ``docs/support.md``: kernel, arch and feature, and how each is known.

The tables are written between two comments of the page, out of what the installed distributions declare
(``hal.Kernel.evidence`` and ``evidence_with``); nothing of it is typed by hand. A kernel that declares a feature on an
arch shows the word that it declares for it there: ``run``, ``emulated``, ``compiled`` or ``claimed``. Features are found
as the conformance kit finds them: some corner of the declaration, as the arch admits it, turns the feature on. The word
is the strongest that is said of any such corner.

``--check`` writes nothing, and exits with 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hal
from hal import _plugins
from hal._kernel import EVIDENCE
from hal._registry import Registry
from hal.errors import RegistrationError
from hal.testing import corners
from hal.testing._wins import home_on
from hal_ops import Op, Request

__all__ = ["Row", "render", "rows", "tables"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
BEGIN = "<!-- Made by tools/support_doc.py from what kernels declare. Change those, and run it. -->"
END = "<!-- The end of what tools/support_doc.py makes. -->"

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
    """One kernel on archs for which it declares the same. ``features`` are those that it has there, each with its word."""

    kernel: hal.Kernel
    archs: tuple[str, ...]
    word: str
    features: Mapping[str, str]


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
            cells = [row.features.get(f, "-") for f in features]
            yield _line([f"`{row.kernel.name}`", f"{', '.join(row.archs)}: {row.word}", *cells, _formats(row.kernel)])


def rows(kernel: hal.Kernel, op: Op, registry: Registry) -> Iterator[Row]:
    """What a kernel declares, archs of which it says the same in one row, in the order in which it names them."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for arch, word, features in _declared(kernel, op, registry):
        groups.setdefault((word, tuple(features.items())), []).append(arch)
    for (word, told), archs in groups.items():
        yield Row(kernel, tuple(archs), word, dict(told))


def _declared(kernel: hal.Kernel, op: Op, registry: Registry) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    same = None if kernel.check else _corners(kernel, op, None)
    named = _named(kernel)
    for arch in named:
        requests = _corners(kernel, op, _home(kernel, arch, registry)) if same is None else same
        yield arch, kernel.evidence_for(arch), _told(kernel, op, requests, arch)
    if _is_open(kernel):
        requests = _corners(kernel, op, None) if same is None else same
        yield (
            f"every {'other ' if named else ''}{_where(kernel)}",
            kernel.evidence_for("*"),
            _told(kernel, op, requests, "*"),
        )


def _named(kernel: hal.Kernel) -> list[str]:
    """Archs that the declaration names."""
    listed = [arch for archs in kernel.platforms.values() for arch in archs.only if "*" not in arch]
    return [arch for arch in dict.fromkeys([*listed, *kernel.evidence]) if arch != "*"]


def _home(kernel: hal.Kernel, arch: str, registry: Registry) -> hal.Device | None:
    """A device of that arch with the newest of all that it needs; None where no platform that is installed knows it."""
    accelerators = [name for name, p in registry.platforms.items() if p.torch_type != "cpu"]
    for name in kernel.platforms or (*accelerators, "cpu"):
        try:
            home = home_on(registry.platforms[name], arch, kernel)
        except (KeyError, ValueError):
            continue  # the platform is not installed, or the arch is another vendor's
        return dataclasses.replace(home, runtime=_NEWEST, driver=_NEWEST)
    return None


def _is_open(kernel: hal.Kernel) -> bool:
    """Whether the declaration admits archs that it does not name."""
    named = [archs for archs in kernel.platforms.values() if archs.only and not any("*" in a for a in archs.only)]
    return not named or len(named) < len(kernel.platforms)


def _where(kernel: hal.Kernel) -> str:
    words = [f"{platform} {archs.words()}".removesuffix(" any") for platform, archs in kernel.platforms.items()]
    return " or ".join(words) or "arch"


@functools.cache
def _corners(kernel: hal.Kernel, op: Op, device: hal.Device | None) -> list[Request]:
    """Requests that the kernel admits, with the newest of all that it needs."""
    names = ["torch", "triton", *(n for needs in kernel.needs for n in needs.names())]
    with hal.simulate(libraries=dict.fromkeys(names, str(_NEWEST))):
        try:
            return corners(kernel, op=op, device=device)
        except RegistrationError:
            # Its check() refuses whatever is asked: what is in the way is this machine's, such as a variable.
            return corners(kernel, op=op)


def _told(kernel: hal.Kernel, op: Op, requests: list[Request], arch: str) -> dict[str, str]:
    """Features that some of the requests turns on, each with the strongest word for it on an arch."""
    words = [(r, kernel.evidence_for(arch, r)) for r in requests]
    found = {f: [word for r, word in words if _is_on(f, r)] for f in _features(op, kernel.phase)}
    return {f: min(told, key=EVIDENCE.index) for f, told in found.items() if told}


def _features(op: Op, phase: str) -> list[str]:
    """Fields that are features of the op, and the requirements that tables should tell."""
    told = ("causal", "kv_dtype", "max_q_len", "v_head_dim")
    rules: Mapping[str, object] = op.request.rules()
    return [
        n for n in rules if op.request.rules()[n].applies(phase) and (not op.request.rules()[n].required or n in told)
    ]


def _is_on(feature: str, request: Request) -> bool:
    value = getattr(request, feature)
    return str(value).startswith("float8") if feature == "kv_dtype" else request.turns_on(feature)


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
