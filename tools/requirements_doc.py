"""Make ``docs/requirements.md``: every requirement, and the tests that hold it.

``docs/requirements.toml`` has the requirements. A test cites the ones it holds in a comment, right above its function
or inside it: ``# requirement D2`` or ``# requirement D2, D4``. So may a helper of a test, for the tests that name it.
``--check`` writes nothing, and exits with 1 if the page is stale, a test cites what does not exist, or a requirement
that waits for nothing has no test.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Citation", "Requirement", "citations", "problems", "render", "requirements"]

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "requirements.toml"
PAGE = ROOT / "docs" / "requirements.md"
TESTS = ("tests/**/test_*.py", "platforms/*/tests/**/test_*.py", "examples/**/test_*.py")

KINDS = ("cpu", "gpu")
WORK = ("triton kernels", "nvidia adapters", "rocm and musa adapters", "integrations", "a machine of two GPUs")

_CITATION = re.compile(r"#\s*requirement\s+(?P<ids>[\w ,]*\w)(:|\Z)")
_ID = re.compile(r"[A-Z]\d+\Z")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One line: what must be true. ``waits`` names the coming work or machine that it still waits for."""

    id: str
    group: str
    text: str
    kind: str
    waits: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Citation:
    """A test that says it holds a requirement. ``test`` is empty where the comment belongs to no test."""

    id: str
    file: str
    line: int
    test: str


def requirements(path: Path = SOURCE) -> tuple[Requirement, ...]:
    """The requirements, in the order of the file.

    Raises:
        ValueError: a row that is not as it should be; the text names it.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return tuple(
        _requirement(name, group["title"], row)
        for group in table.values()
        for name, row in group.items()
        if name != "title"
    )


def _requirement(name: str, group: str, row: Mapping[str, str]) -> Requirement:
    waits = tuple(part.strip() for part in row["waits"].split(",") if part.strip())
    unknown = [part for part in waits if part not in WORK]
    if not _ID.match(name) or set(row) != {"kind", "waits", "text"} or row["kind"] not in KINDS or unknown:
        raise ValueError(f"{name} = {row}: give kind ({' or '.join(KINDS)}), waits (of {', '.join(WORK)}) and text")
    return Requirement(name, group, row["text"], row["kind"], waits)


@functools.lru_cache(maxsize=1)
def citations(root: Path = ROOT) -> tuple[Citation, ...]:
    """Every citation in the tests, by file and line."""
    files = sorted({path for pattern in TESTS for path in root.glob(pattern)})
    return tuple(c for path in files for c in _in_file(path.read_text(encoding="utf-8"), str(path.relative_to(root))))


def _in_file(text: str, name: str) -> Iterator[Citation]:
    functions = list(_functions(ast.parse(text), text.splitlines()))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = _CITATION.search(token.string) if token.type == tokenize.COMMENT else None
        if match is None:
            continue
        line = token.start[0]
        around = [f for f in functions if f.first <= line <= f.last]
        tests = min(around, key=lambda f: f.last - f.first).held_by(functions) if around else ()
        for cited in re.split(r"[, ]+", match["ids"]):
            yield from (Citation(cited, name, line, test) for test in tests or ("",))


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function or class: its lines, decorators and the comments above included, and the names that it uses."""

    name: str
    first: int
    last: int
    uses: frozenset[str]

    @property
    def is_test(self) -> bool:
        return self.name.rpartition(".")[2].startswith(("test_", "Test"))

    def held_by(self, others: Iterable[_Function]) -> tuple[str, ...]:
        """The tests that a comment in it speaks of: itself, or those that use it."""
        if self.is_test:
            return (self.name,)
        return tuple(f.name for f in others if f.is_test and self.name in f.uses)


def _functions(tree: ast.AST, lines: list[str], inside: str = "") -> Iterator[_Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            while first > 1 and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            last = node.end_lineno or first
            while last < len(lines) and re.match(rf"\s{{{node.col_offset + 1},}}#", lines[last]):
                last += 1
            uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            yield _Function(f"{inside}{node.name}", first, last, uses)
            if isinstance(node, ast.ClassDef):
                yield from _functions(node, lines, f"{inside}{node.name}.")


def problems(known: Iterable[Requirement], cited: Iterable[Citation]) -> list[str]:
    """What is wrong with the citations, a line each: unknown ids, comments outside a test, lines that nothing holds."""
    known, cited = tuple(known), tuple(cited)
    ids = {r.id for r in known}
    found = [f"{c.file}:{c.line} cites {c.id!r}, which is no requirement" for c in cited if c.id not in ids]
    found += [f"{c.file}:{c.line} cites {c.id} outside a test" for c in cited if not c.test]
    held = {c.id for c in cited if c.test}
    found += [
        f"{r.id} waits for nothing, can be held without hardware, and no test cites it: {r.text}"
        for r in known
        if r.kind == "cpu" and not r.waits and r.id not in held
    ]
    return found


def render(known: Iterable[Requirement], cited: Iterable[Citation]) -> str:
    """The page."""
    known = tuple(known)
    tests: dict[str, dict[str, list[str]]] = {}
    for citation in cited:
        names = tests.setdefault(citation.id, {}).setdefault(citation.file, [])
        if citation.test and citation.test not in names:
            names.append(citation.test)
    lines = [_HEAD.format(**_counts(known, tests))]
    for group in dict.fromkeys(r.group for r in known):
        mine = [r for r in known if r.group == group]
        lines += ["", f"## {mine[0].id[0]}: {group}", ""]
        lines += [line for r in mine for line in _entry(r, tests.get(r.id, {}))]
    return "\n".join(lines) + "\n"


_HEAD = """# Requirements

<!-- Made by tools/requirements_doc.py from requirements.toml and the tests. Change those, and run it. -->

Each line is something that went wrong in a system of this kind, turned into what HAL must do. Under it stand the tests
that hold it. `CPU` lines can be held without the hardware. `GPU` lines need it, or an emulation of the vendor's
function; where tests stand under one of these already, they hold it for the kernels that run on the CPU.

Of {all} lines {held} are held, {partly} are held in part and wait for coming work, and {waiting} wait altogether."""


def _counts(known: tuple[Requirement, ...], tests: Mapping[str, object]) -> dict[str, int]:
    cited = [r for r in known if r.id in tests]
    partly = sum(bool(r.waits) for r in cited)
    return {"all": len(known), "held": len(cited) - partly, "partly": partly, "waiting": len(known) - len(cited)}


def _entry(requirement: Requirement, tests: Mapping[str, list[str]]) -> Iterator[str]:
    waits = f" *Waits for: {', '.join(requirement.waits)}.*" if requirement.waits else ""
    yield f"- **{requirement.id}** ({requirement.kind.upper()}) {requirement.text}{waits}"
    for file, names in sorted(tests.items()):
        yield f"  - `{file}`: {', '.join(f'`{name}`' for name in names)}"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="make docs/requirements.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is wrong")
    given = parser.parse_args()
    known, cited = requirements(), citations()
    page, found = render(known, cited), problems(known, cited)
    if given.check and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page):
        found.append("docs/requirements.md is stale: run python tools/requirements_doc.py")
    if not given.check:
        PAGE.write_text(page, encoding="utf-8")
    print("\n".join(found) or "every line is held, or waits for coming work")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
