"""The house style, read from the syntax trees: sizes, honest error handling, no vendor in the core.

A rule is a function from a source to the places where it is broken; :data:`EXAMPLES` shows for each rule a source that
breaks it. Exceptions are listed by name, with the reason; one that is needed no more fails too.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    ROOT / "hal",
    ROOT / "ops/hal_ops",
    *sorted(ROOT.glob("platforms/*/hal_*")),
    ROOT / "examples/acme_platform",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One file. ``name`` is its path from the root of the repository."""

    name: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    def all(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        return (node for node in self.nodes if isinstance(node, kinds))

    def at(self, node: ast.AST, text: str = "") -> str:
        return f"{self.name}:{getattr(node, 'lineno', 0)} {text}".rstrip()


@functools.lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    assert len(paths) > 50, "the packages are not where this test looks for them"
    return tuple(Source(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths)


def dotted(node: ast.AST | None) -> str:
    """``a.b.c`` of a name or an attribute; empty for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def code_lines(function: Function) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    last = function.end_lineno or function.lineno
    doc = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return last - function.lineno + 1 - (0 if doc is None else (doc.end_lineno or doc.lineno) - doc.lineno + 1)


def runs_on_a_device(function: Function) -> bool:
    """Whether it is compiled for a device: such a kernel cannot be cut in pieces at will."""
    decorators = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(dotted(d) in ("triton.jit", "triton.autotune", "triton.heuristics", "gluon.jit") for d in decorators)


def long_functions(source: Source) -> Iterator[str]:
    for function in source.all(ast.FunctionDef, ast.AsyncFunctionDef):
        if code_lines(function) > 60 and not runs_on_a_device(function):
            yield source.at(function, f"{function.name}: {code_lines(function)} lines; at most 60")


def long_files(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > 300 and "triton" not in source.name:
        yield f"{source.name}: {lines} lines; at most 300"


def rulers(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.match(r"\s*#\s*([-=*#~]\s*){5,}", line):
            yield f"{source.name}:{number}: a ruler between sections"


def silent_modules(source: Source) -> Iterator[str]:
    if source.tree.body and not ast.get_docstring(source.tree):
        yield f"{source.name}: no docstring"


def unsorted_names(source: Source) -> Iterator[str]:
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__":
            names = list(ast.literal_eval(node.value))
            if names != sorted(set(names)):
                yield source.at(node, "__all__ is not in plain order")


def swallowed_errors(source: Source) -> Iterator[str]:
    """A handler of ``Exception`` raises, or uses what it caught; ``except:`` alone is nowhere."""
    for node in source.all(ast.ExceptHandler):
        caught = "" if node.type is None else ast.unparse(node.type)
        if node.type is None:
            yield source.at(node, "bare except")
        elif re.search(r"\b(Base)?Exception\b", caught) and not _is_heard(node):
            yield source.at(node, f"except {caught} hides what it caught")
    for call in source.all(ast.Call):
        if dotted(call.func).endswith("suppress") and any(dotted(a).endswith("Exception") for a in call.args):
            yield source.at(call, ast.unparse(call))


def _is_heard(handler: ast.ExceptHandler) -> bool:
    inside = [n for statement in handler.body for n in ast.walk(statement)]
    used = {dotted(n) for n in inside} - {""}
    return any(isinstance(n, ast.Raise) for n in inside) or bool(used & {handler.name, "traceback.format_exc"})


def exits(source: Source) -> Iterator[str]:
    if source.name.startswith("hal/cli/"):
        return
    for node in source.all(ast.Call, ast.Raise):
        name = dotted(node.func if isinstance(node, ast.Call) else node.exc)
        if name in ("exit", "quit", "sys.exit", "os._exit", "os.abort", "SystemExit"):
            yield source.at(node, name)


def patches(source: Source) -> Iterator[str]:
    """Writing to an attribute or an item of a module that was imported."""
    modules = {
        (alias.asname or alias.name).partition(".")[0] for node in source.all(ast.Import) for alias in node.names
    }
    for node in source.all(ast.Assign, ast.AugAssign, ast.Delete, ast.Call):
        for target in _written(node):
            if re.split(r"[.\[]", target)[0] in modules:
                yield source.at(node, f"writes to {target}")


def _written(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Call):
        return [f"{ast.unparse(node.args[0])}[...]"] if dotted(node.func) in ("setattr", "delattr") else []
    targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
    return [ast.unparse(t) for t in targets if isinstance(t, (ast.Attribute, ast.Subscript))]


def environment_writes(source: Source) -> Iterator[str]:
    writers = re.compile(r"os\.(putenv|unsetenv)\Z|os\.environ\.(update|setdefault|pop|popitem|clear)\Z")
    for node in source.all(ast.Call):
        if writers.match(dotted(node.func)):
            yield source.at(node, dotted(node.func))


def versions_as_text(source: Source) -> Iterator[str]:
    for node in source.all(ast.Compare):
        ordered = any(isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for op in node.ops)
        if ordered and any(_is_version_text(side) for side in (node.left, *node.comparators)):
            yield source.at(node, ast.unparse(node))


def _is_version_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and re.fullmatch(r"v?\d+(\.\d+)+\w*", node.value) is not None
    if isinstance(node, ast.Attribute):
        return node.attr == "__version__" or dotted(node).startswith("torch.version.")
    name = dotted(node.func) if isinstance(node, ast.Call) else ""
    return name in ("version", "metadata.version", "importlib.metadata.version")


def dropped_keywords(source: Source) -> Iterator[str]:
    """Who takes ``**keywords`` looks at them."""
    for function in source.all(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda):
        star = function.args.kwarg
        if star is not None:
            body = function.body if isinstance(function.body, list) else [function.body]
            if not any(dotted(n) == star.arg for statement in body for n in ast.walk(statement)):
                yield source.at(function, f"**{star.arg} is dropped")


VENDORS = re.compile(r"(?<![a-z])(nvidia|geforce|cuda|rocm|hip|amd|musa|mthreads)(?![a-z0-9])", re.IGNORECASE)
TOLD_BY_TORCH = {
    "hal/_libraries.py": {"cuda", "hip", "musa"},
    "hal/_portable_common.py": {"rocm"},
}
"""Words that are data there: what ``torch/version.py`` of a build writes, and a distribution that carries Triton. No
branch looks at them."""


def vendor_words(source: Source) -> Iterator[str]:
    """Vendors' words in the names of the core and of op contracts, and in their texts that are no sentences (those may
    give examples). Portable kernels may: torch's device types bear vendors' names."""
    contract = source.name.startswith("ops/") and source.name.endswith(("op.py", "request.py", "contract.py"))
    if not (source.name.startswith("hal/") or contract):
        return
    allowed = TOLD_BY_TORCH.get(source.name, set())
    for word, where in _vendor_words(source):
        if word not in allowed:
            yield where


def _vendor_words(source: Source) -> Iterator[tuple[str, str]]:
    docs = {id(node) for node in _docstrings(source)}
    for node in source.nodes:
        texts = [
            getattr(node, f) for f in ("id", "attr", "arg", "name", "asname") if isinstance(getattr(node, f, None), str)
        ]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            texts += [] if " " in node.value.strip() else [node.value]
        for text in texts:
            for match in VENDORS.finditer(text.replace("_", " ")):
                yield match[0].lower(), source.at(node, text)


def _docstrings(source: Source) -> Iterator[ast.AST]:
    for node in source.all(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef):
        yield from (s.value for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))


LONG = "def f():\n" + "    x = 1\n" * 61

EXAMPLES: dict[Callable[[Source], Iterator[str]], tuple[str, ...]] = {
    long_functions: (LONG,),
    long_files: ("x = 1\n" * 301,),
    rulers: ("# ------------\n", "    # === loading ===========\n".replace("loading ", "=")),
    silent_modules: ("x = 1\n",),
    unsorted_names: ('__all__ = ["b", "a"]', '__all__ = ["a", "B"]', '__all__ = ["a", "a"]'),
    swallowed_errors: (
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, Exception) as error: log.debug('failed')",
        "try: f()\nexcept BaseException: x = None",
        "with contextlib.suppress(Exception): f()",
    ),
    exits: ("exit()", "sys.exit(1)", "raise SystemExit", "raise SystemExit(2)", "os._exit(0)"),
    patches: (
        "import torch\ntorch.cuda = None",
        "import sys\nsys.modules['x'] = None",
        "import os\nos.environ['X'] = '1'",
        "import torch\nsetattr(torch.cuda, 'x', 1)",
        "import os\ndel os.environ['X']",
    ),
    environment_writes: ("import os\nos.environ.setdefault('X', '1')", "os.putenv('X', '1')", "os.environ.pop('X')"),
    versions_as_text: (
        "x.__version__ >= '2.10'",
        "torch.version.cuda < cuda",
        "'12.3' <= found",
        "metadata.version('a') > b",
    ),
    dropped_keywords: ("def f(q, **kwargs): return q", "f = lambda q, **kw: q"),
    vendor_words: ("if name == 'nvidia': pass", "is_hip = True", "x.cuda()", "import hal_rocm", "def f(musa): pass"),
}
FINE = '''"""Words about CUDA."""
import os
__all__ = ["B", "a"]
try:
    value = os.environ["X"]
except Exception as error:
    raise ValueError("no X; such as nvidia:sm_90, which is a sentence") from error
def f(**keywords):
    return g(**keywords) if Version.parse(value) >= Version.parse("2.10") else relationship
'''


# requirement X15, P49, P21, E1, P24, C7
@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    found = [text for source in sources() for text in rule(source)]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("rule", "text"),
    [(rule, text) for rule, texts in EXAMPLES.items() for text in texts],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_rule_finds_what_it_is_for(rule: Callable[[Source], Iterator[str]], text: str) -> None:
    assert len(list(rule(Source("hal/example.py", text)))) == 1
    assert list(rule(Source("hal/example.py", FINE))) == []


def test_most_functions_are_short() -> None:
    functions = (f for s in sources() for f in s.all(ast.FunctionDef, ast.AsyncFunctionDef))
    lines = sorted(code_lines(f) for f in functions if not runs_on_a_device(f))
    assert statistics.median(lines) <= 8
    assert lines[int(len(lines) * 0.9)] <= 30


def test_exceptions_to_the_rules_are_still_needed() -> None:
    by_name = {s.name: s for s in sources()}
    for name, allowed in TOLD_BY_TORCH.items():
        assert {word for word, _ in _vendor_words(by_name[name])} == allowed, name
