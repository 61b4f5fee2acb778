"""The documentation: its examples run, its lists are whole, and what is generated is not stale."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hal
from hal import errors
from hal._plugins import GROUP
from hal._reason import REASON_CODES
from hal_ops.attention import AttentionRequest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load(name: str) -> ModuleType:
    """A script of ``tools/``, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


doc_examples = load("doc_examples")
requirements_doc = load("requirements_doc")

PAGES = [page for page in doc_examples.pages() if doc_examples.examples(page)]


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin that the pages quote can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "acme_platform"))
    yield
    hal.reset()


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    found = doc_examples.failures(page, tmp_path)
    assert not found, "\n\n".join(["python tools/doc_examples.py --update renews outputs of commands", *found])


PAGE = """# Title

```python
x = 1
```

```{doctest}
>>> x + 1
3
```

<!-- exit 1 -->
```console
$ python -c "print('one', 2, 'three')"
one ... three
```
"""


def test_a_wrong_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_examples, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    session, command = doc_examples.failures(page, tmp_path)
    assert "Expected:\n    3\nGot:\n    2" in session
    assert "line 8" in session
    assert command.startswith("page.md:14: `python -c \"print('one', 2, 'three')\"` exits with 0, not 1")

    page.write_text(PAGE.replace("3\n", "2\n").replace("<!-- exit 1 -->", ""))
    assert doc_examples.failures(page, tmp_path) == []

    page.write_text("```python\n\nraise KeyError('gone')\n```\n")
    assert doc_examples.failures(page, tmp_path) == ["page.md:3: KeyError: 'gone'"]

    page.write_text("```console\n$ python -c 'print(1)'\n2\n```\n")
    assert "prints\n1\nand the page says\n2" in doc_examples.failures(page, tmp_path)[0]
    assert doc_examples.update(page, tmp_path) == 1
    assert page.read_text() == "```console\n$ python -c 'print(1)'\n1\n```\n"


def test_commands_that_are_not_run_are_written_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only hal and python are run"):
        doc_examples.run("rm -r /", tmp_path)


def test_every_error_has_a_section_with_an_example() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+Error)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == {name for name in errors.__all__ if name.endswith("Error")}
    for name, section in sections.items():
        assert name == "HalError" or "```{doctest}" in section, f"{name} has no example"


def test_every_reason_has_a_line() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    table = text.partition("## Why a kernel was refused")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == sorted(REASON_CODES)


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(n for n in hal.__all__ if n not in ("errors", "testing"))
    assert {"hal.errors", "hal.testing", "hal_ops"} <= set(re.findall(r"^\.\. automodule:: (\S+)", text, re.MULTILINE))


def test_every_command_is_on_its_page() -> None:
    from hal.cli._app import COMMANDS

    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `hal (\w+)", text, re.MULTILINE)) == sorted(COMMANDS)


def test_every_file_that_a_page_links_to_is_there() -> None:
    broken = []
    for page in (*doc_examples.pages(), ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(["", *broken])


def test_what_pages_name_of_the_code_is_there() -> None:
    missing = []
    for page in doc_examples.pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        names = re.findall(r"`(hal(?:_ops)?(?:\.\w+)+)(?:\(|`)", text)
        missing += [f"{page.name}: {name}" for name in names if name != GROUP and not exists(name)]
        files = re.findall(r"`((?:hal|ops|tests|tools|docs|examples|platforms)/[\w/.]+)`", text)
        kept = (file for file in files if not file.startswith("docs/_build/"))
        missing += [f"{page.name}: {file}" for file in kept if not (ROOT / file).exists()]
    assert not missing, "\n".join(["", *missing])


def exists(dotted: str) -> bool:
    """Whether ``package.module.attribute`` is there. A field of a class that its instances get counts."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            known = hasattr(found, part) or part in getattr(found, "__annotations__", {})
            if not known:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_commands_of_make_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in doc_examples.pages():
        named = re.findall(r"^make ((?:[\w-]+ ?)+)|`make ([\w-]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
        words = {word for pair in named for text in pair for word in text.split()}
        assert words <= targets, f"{page.name}: {words - targets}"


def test_the_version_is_the_same_everywhere() -> None:
    assert f"{hal.__version__}, the first release" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def unserved() -> hal.Selection:
    with hal.simulate("cpu:x86_64"), hal.override(strict=True, disable=["torch_cpu"]):
        return hal.select(AttentionRequest(num_q_heads=2, num_kv_heads=2, head_dim=64, phases=("prefill",)))


GIVES_NONE: dict[str, Callable[[], Any]] = {
    "Selection.kernels": lambda: unserved().kernels()["prefill"],
    "installed": lambda: hal.installed("no-such-library"),
    "Version.satisfies": lambda: hal.Version.parse("").satisfies(">=1"),
}
"""Public functions whose result may be None, each with a call that gives it."""


def may_give_none() -> Iterator[tuple[str, Any]]:
    for name in hal.__all__:
        value = getattr(hal, name)
        members = {f"{name}.{n}": m for n, m in vars(value).items()} if inspect.isclass(value) else {name: value}
        for member, function in members.items():
            function = getattr(function, "__func__", getattr(function, "fget", function))
            public = inspect.isfunction(function) and not member.rpartition(".")[2].startswith("_")
            if public and "| None" in str(function.__annotations__.get("return")):
                yield member, function


def test_functions_that_may_give_none_say_so_and_do() -> None:
    # requirement A7
    found = dict(may_give_none())
    assert found.keys() == GIVES_NONE.keys()
    for name, function in found.items():
        assert "None" in (inspect.getdoc(function) or ""), f"{name} does not say when it gives None"
        assert GIVES_NONE[name]() is None, name


def test_requirements_are_held() -> None:
    found = requirements_doc.problems(requirements_doc.requirements(), requirements_doc.citations())
    assert not found, "\n".join(["", *found])


def test_the_page_of_requirements_is_not_stale() -> None:
    page = requirements_doc.render(requirements_doc.requirements(), requirements_doc.citations())
    assert requirements_doc.PAGE.read_text(encoding="utf-8") == page, "run python tools/requirements_doc.py"


def test_every_requirement_is_there() -> None:
    known = [r.id for r in requirements_doc.requirements()]
    counts = {"A": 7, "B": 16, "C": 11, "D": 15, "E": 14, "X": 20, "P": 50, "R": 16}
    assert known == [f"{letter}{i}" for letter, count in counts.items() for i in range(1, count + 1)]


CITING = """
# requirement A1, A2
@decorated(1)
@decorated(2)
def test_one():
    pass

class TestTwo:
    def test_inside(self):  # noqa: X1  # requirement A3
        helper()

def helper():
    # requirement B1: because
    pass

def nobody():
    # requirement B2
    pass

def test_three():
    helper("# requirement B9")
    # requirement Z9
""".replace("{mark}", "# requirement"[2:])


def test_citations_are_found_where_they_stand() -> None:
    cited = [(c.id, c.test) for c in requirements_doc._in_file(CITING, "test_x.py")]
    assert cited == [
        ("A1", "test_one"),
        ("A2", "test_one"),
        ("A3", "TestTwo.test_inside"),
        ("B1", "TestTwo"),
        ("B1", "TestTwo.test_inside"),
        ("B1", "test_three"),
        ("B2", ""),
        ("Z9", "test_three"),
    ]


def test_what_is_wrong_with_requirements_is_said() -> None:
    known = (
        requirements_doc.Requirement("A1", "group", "held", "cpu", ()),
        requirements_doc.Requirement("A2", "group", "open", "cpu", ()),
        requirements_doc.Requirement("A3", "group", "waits", "cpu", ("nvidia adapters",)),
        requirements_doc.Requirement("A4", "group", "needs a GPU", "gpu", ()),
    )
    cited = (
        requirements_doc.Citation("A1", "t.py", 3, "test_a"),
        requirements_doc.Citation("A9", "t.py", 5, "test_a"),
        requirements_doc.Citation("A4", "t.py", 7, ""),
    )
    unknown, outside, open_line = requirements_doc.problems(known, cited)
    assert unknown == "t.py:5 cites 'A9', which is no requirement"
    assert outside == "t.py:7 cites A4 outside a test"
    assert open_line.startswith("A2 waits for nothing")


@pytest.mark.parametrize(
    "row", ['A1 = { kind = "tpu", waits = "", text = "x" }', 'A1 = { kind = "cpu", waits = "luck", text = "x" }']
)
def test_rows_that_are_wrong_are_refused(tmp_path: Path, row: str) -> None:
    file = tmp_path / "requirements.toml"
    file.write_text(f'[A]\ntitle = "t"\n{row}\n')
    with pytest.raises(ValueError, match=r"A1 = .*give kind"):
        requirements_doc.requirements(file)
