"""The examples of the pages, run: ``python tools/doc_examples.py [--update] [page ...]``.

In a page, ``python`` and ``{testcode}`` fences are code, a ``{doctest}`` fence is a session, and a ``console`` fence
holds commands (``$ hal ...``) with what they print. All examples of one page run in order: code and sessions in one
namespace, commands in one folder. In a command's output ``...`` stands for anything; without output, only its exit
status is looked at, which must be 0 unless ``<!-- exit 1 -->`` stands above the fence. Other fences (``sh``, ``text``)
are not run.

``--update`` replaces outputs that have changed and hold no ``...``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import doctest
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Example", "examples", "failures", "pages"]

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"python": "python", "{testcode}": "python", "{doctest}": "doctest", "console": "console"}

_FENCE = re.compile(r"(`{3,})\s*(\S*)")
_EXIT = re.compile(r"<!-- exit (\d+) -->")


@dataclasses.dataclass(frozen=True)
class Example:
    """One fence: its kind, its lines, the number of the first one in the page, and the status its commands end with."""

    kind: str
    lines: tuple[str, ...]
    first: int
    status: int = 0


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a console example. Its output is the lines ``start`` to ``end`` of the example."""

    text: str
    start: int
    end: int


def pages() -> list[Path]:
    """Every page that may hold examples."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: Path) -> list[Example]:
    """The examples of a page, in order."""
    found = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    above = ""
    for _, line in lines:
        match = _FENCE.match(line)
        if match is None:
            above = line or above
            continue
        body = []
        for number, inner in lines:
            if inner.startswith(match[1]):
                break
            body.append((number, inner))
        status = _EXIT.match(above)
        if match[2] in KINDS and body:
            texts = tuple(text for _, text in body)
            found.append(Example(KINDS[match[2]], texts, body[0][0], int(status[1]) if status else 0))
        above = ""
    return found


def failures(page: Path, folder: Path) -> list[str]:
    """Run a page's examples in ``folder``: what does not do as the page says, a text each."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found: list[str] = []
    with _working_in(folder):
        for example in examples(page):
            where = f"{page.relative_to(ROOT)}:{example.first}"
            if example.kind == "console":
                found += [f"{where}: {text}" for text in _console(example, folder)]
            elif example.kind == "doctest":
                found += _session(example, namespace, page)
            else:
                found += _code(example, namespace, page)
    return found


def _code(example: Example, namespace: dict[str, Any], page: Path) -> list[str]:
    text = "\n" * (example.first - 1) + "\n".join(example.lines)
    try:
        exec(compile(text, str(page), "exec"), namespace)
    except Exception as error:  # noqa: BLE001 - the finding
        here = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
        line = here[-1] if here else example.first
        return [f"{page.relative_to(ROOT)}:{line}: {type(error).__name__}: {error}"]
    return []


def _session(example: Example, namespace: dict[str, Any], page: Path) -> list[str]:
    name = str(page.relative_to(ROOT))
    session = doctest.DocTestParser().get_doctest("\n".join(example.lines), {}, name, name, example.first - 1)
    session.globs = namespace
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(session, out=said.append, clear_globs=False)
    return ["".join(said)] if said else []


def _console(example: Example, folder: Path) -> Iterator[str]:
    for command in commands(example):
        expected = example.lines[command.start : command.end]
        output, status = run(command.text, folder)
        if status != example.status:
            yield f"`{command.text}` exits with {status}, not {example.status}; it prints\n{output}"
        elif expected and not matches(expected, output):
            yield f"`{command.text}` prints\n{output}\nand the page says\n" + "\n".join(expected)


def commands(example: Example) -> list[Command]:
    """The commands of a console example. One that ends in a backslash goes on in the next line."""
    starts = [i for i, line in enumerate(example.lines) if line.startswith("$ ")]
    found = []
    for start, end in zip(starts, [*starts[1:], len(example.lines)], strict=True):
        last = start
        while example.lines[last].endswith("\\"):
            last += 1
        text = " ".join(line.removeprefix("$ ").rstrip("\\").strip() for line in example.lines[start : last + 1])
        found.append(Command(text, last + 1, end))
    return found


def run(command: str, folder: Path) -> tuple[str, int]:
    """What a command prints, and its exit status. ``VARIABLE=value`` in front is set for it alone.

    What it writes to stderr counts where it fails: progress goes there too.

    Raises:
        ValueError: the command is neither ``hal`` nor ``python``.
    """
    words = shlex.split(command)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
    environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    if words[0] not in ("hal", "python"):
        raise ValueError(f"`{command}`: only hal and python are run; write other commands in a sh fence")
    words[:1] = [sys.executable, "-m", "hal"] if words[0] == "hal" else [sys.executable]
    done = subprocess.run(words, env=environ, cwd=folder, capture_output=True, text=True, check=False)
    return (done.stdout + (done.stderr if done.returncode else "")).rstrip(), done.returncode


def matches(expected: Sequence[str], output: str) -> bool:
    """Whether an output is what a page shows, where ``...`` is anything."""
    wanted = "\n".join(line.rstrip() for line in expected).strip("\n")
    found = "\n".join(line.rstrip() for line in output.splitlines()).strip("\n")
    return re.fullmatch(re.escape(wanted).replace(re.escape("..."), ".*"), found, re.DOTALL) is not None


def update(page: Path, folder: Path) -> int:
    """Replace the outputs of commands that have changed; how many there were."""
    lines = page.read_text(encoding="utf-8").splitlines()
    changes: list[tuple[int, int, str]] = []
    for example in (e for e in examples(page) if e.kind == "console"):
        for command in commands(example):
            old = example.lines[command.start : command.end]
            output, _ = run(command.text, folder)
            if old and "..." not in "\n".join(old) and not matches(old, output):
                changes.append((example.first - 1 + command.start, example.first - 1 + command.end, output))
    for start, end, output in reversed(changes):
        lines[start:end] = [line.rstrip() for line in output.splitlines()]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(changes)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    """Run or update the pages that are named, or all."""
    parser = argparse.ArgumentParser(description="run the examples of the documentation")
    parser.add_argument("--update", action="store_true", help="replace the outputs of commands that have changed")
    parser.add_argument("pages", nargs="*", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples" / "acme_platform"))  # the plugin that the pages quote
    wrong = 0
    for page in [p.resolve() for p in given.pages] or pages():
        with tempfile.TemporaryDirectory() as folder:
            if given.update:
                print(f"{page.relative_to(ROOT)}: {update(page, Path(folder))} outputs replaced")
                continue
            found = failures(page, Path(folder))
        print("\n\n".join(found) if found else f"{page.relative_to(ROOT)}: right")
        wrong += bool(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
