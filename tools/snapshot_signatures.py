"""Reads the signatures of the functions that adapters call out of the real distributions, and keeps them as JSON.

    python tools/snapshot_signatures.py [LIBRARY ...] [--cache DIR] [--check | --latest | --history]

What to read is in ``platforms/*/signatures/sources.toml``; what was read goes beside it, one file a library. Nothing
that is downloaded is imported: signatures come from syntax trees, operators from torch's schema file. Each change
against what was kept is printed; ``--check`` writes nothing and fails if there is one. ``--latest`` instead compares
the registry's newest release with the newest version kept, and fails if a signature differs. ``--history`` downloads
nothing, and prints what each version that is kept changed against the one before.

Archives are taken from ``--cache`` if they lie there, and are left there; a bare clone of a repository may lie there as
``<name>.git``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from signature_diff import differences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = "torchgen/packaged/ATen/native/native_functions.yaml"

Kept = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Files:
    """The text files of one version of a library. ``name`` says where they come from."""

    name: str
    texts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Library:
    """One table of ``sources.toml``."""

    name: str
    folder: Path
    table: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def schemas(self) -> str:
        """The file of operators, or a patch of it."""
        return str(self.table.get("schemas", SCHEMAS))

    def versions(self) -> list[str]:
        return list(self.table.get("versions") or self.table["commits"])

    def wanted(self) -> dict[str, list[str]]:
        """Path in the archive to the functions in it, as they are called in ``sources.toml``."""
        found: dict[str, list[str]] = {}
        for function in self.table["functions"]:
            module = function.partition(":")[0]
            path = self.schemas if module == "aten" else f"{module.replace('.', '/')}.py"
            found.setdefault(path, []).append(function)
        return found


def libraries(names: list[str]) -> list[Library]:
    found = {}
    for source in sorted(ROOT.glob("platforms/*/signatures/sources.toml")):
        for name, table in tomllib.loads(source.read_text(encoding="utf-8")).items():
            found[name] = Library(name, source.parent, table)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SystemExit(f"no sources.toml knows {', '.join(unknown)}; there are {', '.join(found)}")
    return [library for name, library in found.items() if not names or name in names]


def read(library: Library, version: str, cache: Path) -> Files:
    """The files of one version that hold wanted functions; those it lacks are left out."""
    if "git" in library.table:
        return _from_git(library, library.table["commits"][version], cache)
    return _from_archive(library, _download(library, version, cache))


def _from_git(library: Library, commit: str, cache: Path) -> Files:
    url = library.table["git"]
    clone = cache / f"{url.rpartition('/')[2]}.git"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", "--bare", "--filter=blob:none", url, str(clone)], check=True)
    texts = {}
    for path in library.wanted():
        root = library.table.get("root", "")
        where = f"{commit}:{root}/{path}" if root else f"{commit}:{path}"
        done = subprocess.run(["git", "-C", str(clone), "show", where], capture_output=True, text=True)
        if done.returncode == 0:
            texts[path] = done.stdout
    return Files(f"{url}@{commit}", texts)


def _download(library: Library, version: str, cache: Path) -> Path:
    """The archive of a version (``""`` is the newest), from the cache or through pip."""
    package = library.table["package"]
    stem = re.sub(r"[-_.]+", "[-_.]", package)
    pattern = re.compile(rf"{stem}-{re.escape(version)}(-.*\.whl|\.tar\.gz)\Z", re.IGNORECASE)
    held = [path for path in cache.iterdir() if version and pattern.match(path.name)]
    if held:
        return held[0]
    spec = f"{package}=={version}" if version else package
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fresh, spec]
        environment = {**os.environ, **library.table.get("environment", {})}
        beta = ["--pre"] if re.search(r"\d(a|b|rc)\d", library.versions()[-1]) else []
        subprocess.run([*command, *beta, *_options(library)], check=True, env=environment)
        (archive,) = Path(fresh).iterdir()
        return archive.rename(cache / archive.name)


def _options(library: Library) -> list[str]:
    if library.table.get("sdist"):
        return ["--no-binary", ":all:", "--no-build-isolation"]
    platforms = [f"--platform={name}" for name in library.table["platforms"]]
    return ["--only-binary", ":all:", "--python-version", library.table.get("python", "3.12"), *platforms]


def _from_archive(library: Library, archive: Path) -> Files:
    wanted = library.wanted()
    root = library.table.get("root", "")
    texts = {}
    for name, text in _members(archive):
        inside = name.partition("/")[2] if archive.name.endswith(".gz") else name
        path = inside.removeprefix(f"{root}/") if root else inside
        if path in wanted:
            texts[path] = text().decode("utf-8")
    return Files(archive.name, texts)


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                yield name, lambda name=name: wheel.read(name)
        return
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile():
                yield member.name, lambda member=member: source.extractfile(member).read()


def signatures(library: Library, files: Files) -> Kept:
    """Function to its file, line and parameters, for those that the files have."""
    found: Kept = {}
    for path, functions in library.wanted().items():
        if path not in files.texts:
            continue
        read_all = _schemas if path == library.schemas else _definitions
        there = read_all(files.texts[path])
        for function in functions:
            name = function.partition(":")[2]
            if name in there:
                line, parameters = there[name]
                found[function] = {"file": path, "line": line, "parameters": parameters}
    return found


def _definitions(text: str) -> dict[str, tuple[int, list[str]]]:
    """Qualified name to line and parameters. Of several definitions of one name the last counts; overloads do not."""
    found: dict[str, tuple[int, list[str]]] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not any(ast.unparse(d).endswith("overload") for d in node.decorator_list):
                    found[prefix + node.name] = (node.lineno, parameters_of(node.args, bool(prefix)))
            elif isinstance(node, (ast.If, ast.Try)):
                walk([*node.body, *node.orelse], prefix)

    walk(ast.parse(text).body, "")
    return found


def parameters_of(args: ast.arguments, method: bool) -> list[str]:
    """Parameters as source, without annotations, ``self`` left out; ``*`` and ``/`` stand as items of their own."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    found = [_parameter(a, d) for a, d in zip(plain, defaults, strict=True)]
    if args.posonlyargs:
        found.insert(len(args.posonlyargs), "/")
    if args.vararg or args.kwonlyargs:
        found.append(f"*{args.vararg.arg}" if args.vararg else "*")
    found += [_parameter(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    found += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return found[1:] if method and found and found[0] in ("self", "cls") else found


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}"


def _schemas(text: str) -> dict[str, tuple[int, list[str]]]:
    """Operator to line and parameters, of torch's ``native_functions.yaml`` or of a patch that adds to it."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\+?- func: (\w+)\((.*)\) -> ", line)
        if match:
            found[match[1]] = (number, [_schema_parameter(part) for part in match[2].split(", ")])
    return found


def _schema_parameter(text: str) -> str:
    name, equals, default = text.rpartition(" ")[2].partition("=")
    return f"{name}={default.replace('[]', '()')}" if equals else name


def kept(library: Library) -> Kept:
    if not library.path.exists():
        return {}
    held: Kept = json.loads(library.path.read_text(encoding="utf-8"))["versions"]
    return held


def refresh(library: Library, cache: Path, write: bool) -> list[str]:
    """Read every version; returns what changed."""
    old, new, changes = kept(library), {}, []
    for version in library.versions():
        files = read(library, version, cache)
        functions = signatures(library, files)
        new[version] = {"source": files.name, "functions": functions}
        before = old.get(version, {}).get("functions", {})
        changes += differences(before, functions, f"{library.name} {version}")
    changes += [f"{library.name} {version} is no longer read" for version in old if version not in new]
    if write:
        text = json.dumps({"library": library.name, "versions": new}, indent=1)
        library.path.write_text(f"{text}\n", encoding="utf-8")
    return changes


def upstream(library: Library, cache: Path) -> list[str]:
    """What the registry's newest release changes against the newest version that is kept."""
    if "package" not in library.table:
        return []
    newest = library.versions()[-1]
    files = _from_archive(library, _download(library, "", cache))
    label = f"{library.name} {newest} -> {files.name}"
    return differences(kept(library)[newest]["functions"], signatures(library, files), label)


def history(library: Library) -> list[str]:
    """What each kept version changed against the one before it."""
    lines = []
    for (old, before), (new, after) in itertools.pairwise(kept(library).items()):
        lines += differences(before["functions"], after["functions"], f"{library.name} {old} -> {new}")
    return lines


def _compared(library: Library, cache: Path, options: argparse.Namespace) -> list[str]:
    if options.history:
        return history(library)
    return upstream(library, cache) if options.latest else refresh(library, cache, not options.check)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="*")
    parser.add_argument("--cache", type=Path)
    how = parser.add_mutually_exclusive_group()
    for name in ("--check", "--latest", "--history"):
        how.add_argument(name, action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        changes = []
        for library in libraries(options.library):
            changes += _compared(library, cache, options)
    print("\n".join(changes) or "nothing changed")
    raise SystemExit(1 if changes and (options.check or options.latest) else 0)


if __name__ == "__main__":
    main()
