"""``tools/snapshot_signatures.py``: signatures out of made-up distributions, without a network, and what is said of
changes."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = """
[lib]
package = "lib"
platforms = ["any"]
versions = ["1.0", "2.0"]
functions = ["lib.core:attend", "lib.core:Wrapper.plan", "lib.other:absent"]
"""
ONE = """
def attend(q, k, v, scale=None, *, sinks=None): ...
class Wrapper:
    def plan(self, indptr, window=-1, causal=False): ...
"""
TWO = """
try:
    def attend(q, k, v, window=(-1, -1), scale=1.0, *, sinks): ...
except ImportError:
    pass
class Wrapper:
    def plan(self, indptr, causal=False, window=-1, cap=None): ...
"""


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of ``tools/``, which imports its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with one made-up library in two versions, whose wheels lie in the cache."""
    module = load("snapshot_signatures", monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "platforms" / "acme" / "signatures"
    folder.mkdir(parents=True)
    (folder / "sources.toml").write_text(SOURCES)
    (tmp_path / "cache").mkdir()
    for version, text in (("1.0", ONE), ("2.0", TWO)):
        wheel(tmp_path / "cache" / f"lib-{version}-py3-none-any.whl", text)
    return module


def wheel(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lib/core.py", text)


def run(tool: ModuleType, tmp_path: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as found:
        tool.main(["--cache", str(tmp_path / "cache"), *arguments])
    return int(found.value.code or 0)


def kept(tmp_path: Path) -> dict[str, Any]:
    text = (tmp_path / "platforms" / "acme" / "signatures" / "lib.json").read_text()
    found: dict[str, Any] = json.loads(text)["versions"]
    return found


def test_signatures_are_kept_with_their_file(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:  # requirement A4
    assert run(tool, tmp_path) == 0
    found = kept(tmp_path)
    assert list(found) == ["1.0", "2.0"]
    assert found["1.0"]["source"] == "lib-1.0-py3-none-any.whl"
    attend = found["1.0"]["functions"]["lib.core:attend"]
    assert attend == {"file": "lib/core.py", "line": 2, "parameters": ["q", "k", "v", "scale=None", "*", "sinks=None"]}
    assert found["2.0"]["functions"]["lib.core:attend"]["parameters"][3] == "window=(-1, -1)"
    assert "lib.other:absent" not in found["1.0"]["functions"]
    assert "  lib.core:attend is new: (q, k, v, scale=None, *, sinks=None)" in capsys.readouterr().out
    assert run(tool, tmp_path) == 0
    assert capsys.readouterr().out == "nothing changed\n"


def test_check_writes_nothing_and_fails_on_a_difference(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    # requirement A4
    assert run(tool, tmp_path, "--check") == 1
    assert not (tmp_path / "platforms" / "acme" / "signatures" / "lib.json").exists()
    assert run(tool, tmp_path) == 0
    assert run(tool, tmp_path, "--check") == 0
    before = kept(tmp_path)
    wheel(tmp_path / "cache" / "lib-2.0-py3-none-any.whl", TWO.replace("cap=None", "softcap=None"))
    capsys.readouterr()
    assert run(tool, tmp_path, "--check") == 1
    assert kept(tmp_path) == before
    assert capsys.readouterr().out.splitlines() == [
        "lib 2.0",
        "  lib.core:Wrapper.plan",
        "    - cap=None",
        "    + softcap=None, after window",
    ]


CHANGES = [
    "lib 1.0 -> 2.0",
    "  lib.core:attend",
    "    + window=(-1, -1), after v",
    "    ~ scale: default 1.0, was None",
    "    ~ sinks: default none (required), was None",
    "  lib.core:Wrapper.plan",
    "    + cap=None, after window",
    "    > order: causal, window; was window, causal",
]


def test_the_history_of_what_is_kept_needs_no_archive(tool: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert run(tool, tmp_path) == 0
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(tool, tmp_path, "--history") == 0
    assert capsys.readouterr().out.splitlines() == CHANGES


def test_the_newest_release_is_held_against_the_newest_kept(
    tool: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tool, tmp_path) == 0
    wheel(tmp_path / "cache" / "lib-3.0-py3-none-any.whl", TWO.replace("q, k, v", "query, k, v"))
    monkeypatch.setattr(
        tool, "_download", lambda library, version, cache: cache / f"lib-{version or '3.0'}-py3-none-any.whl"
    )
    capsys.readouterr()
    assert run(tool, tmp_path, "lib", "--latest") == 1
    assert capsys.readouterr().out.splitlines() == [
        "lib 2.0 -> lib-3.0-py3-none-any.whl",
        "  lib.core:attend",
        "    - q",
        "    + query, first",
    ]


def test_source_archives_are_read_too(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cache" / "lib-2.0-py3-none-any.whl").unlink()
    with tarfile.open(tmp_path / "cache" / "lib-2.0.tar.gz", "w:gz") as archive:
        data = TWO.encode()
        member = tarfile.TarInfo("lib-2.0/lib/core.py")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    assert run(tool, tmp_path) == 0
    assert kept(tmp_path)["2.0"]["source"] == "lib-2.0.tar.gz"
    assert set(kept(tmp_path)["2.0"]["functions"]) == {"lib.core:attend", "lib.core:Wrapper.plan"}


def test_an_unknown_library_is_named_beside_those_that_are_known(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no sources\.toml knows libb; there are lib"):
        tool.main(["libb"])


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (["a", "b=1"], ["a", "*", "b=1"], ["~ b: keyword-only, was positional"]),
        (["a", "/", "b"], ["a", "b"], ["~ a: positional, was positional-only"]),
        (["a"], ["a", "**kwargs"], ["+ **kwargs, keywords, after a"]),
        (["a", "*args"], ["a"], ["- *args"]),
        (["a", "*", "b=1"], ["a", "*", "c=2", "b=1"], ["+ c=2, keyword-only, after a"]),
        (["a", "*", "b=1", "c=2"], ["a", "*", "c=2", "b=1"], []),
        (["a", "b=f(x=1)"], ["a", "b=f(x=2)"], ["~ b: default f(x=2), was f(x=1)"]),
    ],
)
def test_each_kind_of_change(before: list[str], after: list[str], lines: list[str], monkeypatch: Any) -> None:
    assert load("signature_diff", monkeypatch).changes(before, after) == lines


def test_what_the_project_keeps_has_the_form_that_the_tool_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library of every ``sources.toml`` is kept, in the versions that are named there, oldest first."""
    tool = load("snapshot_signatures", monkeypatch)
    for library in tool.libraries([]):
        assert list(tool.kept(library)) == library.versions(), library.name
        for version, held in tool.kept(library).items():
            assert held["functions"], f"{library.name} {version}"
            assert set(held["functions"]) <= set(library.table["functions"])
