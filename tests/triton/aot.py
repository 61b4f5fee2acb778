"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what the compilers say of the result.

``python tests/triton/aot.py`` compiles every variant of every kernel for every target and writes
``docs/_data/triton_aot.json``; ``--stale`` compiles only what has changed, ``--only TEXT`` keeps the rows of all others.
``tools/triton_doc.py`` makes ``docs/triton-resources.md`` of it. Variants come from the files
``variants_*.py`` beside this one: each has a function ``variants()`` that yields :class:`Variant`.

A row says: registers a thread, bytes of stack a thread (spilled registers live there), bytes of shared memory a block
against what the arch gives one block, and the error text where the compiler refused.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = ROOT / "docs/_data/triton_aot.json"


@dataclasses.dataclass(frozen=True)
class Target:
    """An arch to compile for. ``shared`` is the most bytes of shared memory (LDS) that a block may use."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    formats: frozenset[str]
    """FP8 formats that the platforms declare as ``triton_fp8_...``, by the names that Triton gives them."""


def _cuda(number: int, shared: int) -> Target:
    formats = {"fp8e5", *(("fp8e4nv",) if number >= 89 else ())}
    return Target(f"sm_{number}", "cuda", number, 32, shared, frozenset(formats))


def _hip(name: str, warp_size: int, shared: int, *formats: str) -> Target:
    return Target(name, "hip", name, warp_size, shared, frozenset(formats))


# Shared memory a block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; LDS: LLVM, "User
# Guide for AMDGPU Backend": 160 KiB on gfx950, 64 KiB elsewhere.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 163 << 10),
        _cuda(90, 227 << 10),
        _cuda(100, 227 << 10),
        _cuda(120, 99 << 10),
        _hip("gfx90a", 64, 64 << 10),
        _hip("gfx942", 64, 64 << 10, "fp8e4b8", "fp8e5b16"),
        _hip("gfx950", 64, 160 << 10, "fp8e4nv", "fp8e5"),
        _hip("gfx1100", 32, 64 << 10),
        _hip("gfx1201", 32, 64 << 10, "fp8e4nv", "fp8e5"),
    )
}


STACK = 32
"""Bytes a thread that ptxas may keep on the stack of a main path: eight registers, outside loops as a rule."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with one configuration.

    Fields:
        kernel: ``"module:function"`` of a ``triton.jit`` function.
        label: tells it from the kernel's other variants. Unique together with ``kernel``.
        signature: argument to Triton type (``"*bf16"``, ``"i32"``); those in ``constants`` are left out.
        constants: values of the ``tl.constexpr`` arguments. None may stand for a pointer that is not given.
        aligned: arguments that are multiples of 16 (addresses and strides).
        options: ``num_warps``, ``num_stages`` and the like.
        targets: names of the targets that the configuration is for.
        main: a path that must not spill.
    """

    kernel: str
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = tuple(TARGETS)
    main: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel.rpartition(':')[2]} {self.label}"

    def __hash__(self) -> int:
        return hash((self.kernel, self.label))

    def digest(self) -> str:
        """Changes with the kernel's source, that of the device functions it calls, and the configuration."""
        facts = [self.signature, self.constants, self.aligned, self.options]
        text = json.dumps(facts, sort_keys=True, default=str) + "".join(_sources(resolve(self.kernel), set()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve(kernel: str) -> Any:
    module, _, name = kernel.partition(":")
    return getattr(importlib.import_module(module), name)


def _sources(function: Any, seen: set[str]) -> Iterator[str]:
    if function.__name__ in seen:
        return
    seen.add(function.__name__)
    yield function.src
    for name in sorted(function.fn.__code__.co_names):
        called = function.fn.__globals__.get(name)
        if hasattr(called, "src") and not called.__module__.startswith("triton."):
            yield from _sources(called, seen)


def variants() -> list[Variant]:
    """The variants of all files ``variants_*.py``.

    Raises:
        ValueError: two of them have one name.
    """
    found: list[Variant] = []
    for path in sorted(HERE.glob("variants_*.py")):
        name = f"hal_triton_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules.setdefault("hal_triton_tests_aot", sys.modules[__name__])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.variants()
    twice = {v.name for v in found if sum(v.name == other.name for other in found) > 1}
    if twice:
        raise ValueError(f"variants with one name: {', '.join(sorted(twice))}")
    return found


def compile_variant(variant: Variant, target: Target) -> dict[str, Any]:
    """A row of the table. What the compiler refuses becomes the row's ``error``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    from hal_ops._launch import FUSED

    function = resolve(variant.kernel)
    row: dict[str, Any] = {
        "kernel": variant.kernel,
        "label": variant.label,
        "target": target.name,
        "digest": variant.digest(),
        "triton": triton.__version__,
        "main": variant.main,
        "shared_limit": target.shared,
    }
    names = function.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    missing = [n for n in names if n not in variant.signature and n not in variant.constants]
    if missing:
        raise ValueError(f"{variant.name}: no type and no value for {', '.join(missing)}")
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(function, signature, dict(variant.constants), attributes)
    try:
        made = triton.compile(
            source, GPUTarget(target.backend, target.arch, target.warp_size), options={**FUSED, **variant.options}
        )
    except (TritonError, RuntimeError) as error:
        return {**row, "error": f"{type(error).__name__}: {error}".strip()[:600]}
    used = _cuda_resources(made.asm["cubin"]) if target.backend == "cuda" else _hip_resources(made.asm["amdgcn"])
    return {**row, "shared": made.metadata.shared, **used}


def _cuda_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump says nothing of registers: {text}"
    return {"registers": int(found[1]), "stack": int(found[2])}


def _cuobjdump() -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.exists():
        raise FileNotFoundError(f"{path}: this Triton brings no cuobjdump to read resource usage with")
    return path


def _hip_resources(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        assert found is not None, f"the assembly has no {name}"
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spilled": number("vgpr_spill_count"),
    }


def fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a row; an empty string if nothing is."""
    if row.get("error"):
        return str(row["error"])
    if row["shared"] > row["shared_limit"]:
        return f"{row['shared']} bytes of shared memory; {row['target']} gives a block {row['shared_limit']}"
    if "spilled" in row:
        return f"registers spilled: {row['spilled']}" if row["main"] and row["spilled"] else ""
    return f"{row['stack']} bytes spilled" if row["main"] and row["stack"] > STACK else ""


def _row(task: tuple[Variant, str]) -> dict[str, Any]:
    return compile_variant(task[0], TARGETS[task[1]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile variants whose name contains this; keep other rows")
    parser.add_argument("--stale", action="store_true", help="compile only variants that the table has not as they are")
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, and leave the table as it is")
    given = parser.parse_args()
    tasks = [
        (variant, target)
        for variant in variants()
        for target in variant.targets
        if given.only in variant.name and target in (given.target or variant.targets)
    ]
    known = [] if given.dry or not TABLE.exists() else json.loads(TABLE.read_text())
    if given.stale:
        have = {(r["kernel"], r["label"], r["target"], r["digest"]) for r in known}
        tasks = [(v, target) for v, target in tasks if (v.kernel, v.label, target, v.digest()) not in have]
    kept = _still_true(known, tasks)
    with concurrent.futures.ProcessPoolExecutor(given.jobs) as pool:
        rows = [_shown(row) for row in pool.map(_row, tasks)]
    if not given.dry:
        rows = sorted([*kept, *rows], key=lambda r: (r["kernel"], r["label"], r["target"]))
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return int(any(fault(row) for row in rows))


def _still_true(rows: list[dict[str, Any]], tasks: list[tuple[Variant, str]]) -> list[dict[str, Any]]:
    """Rows of variants that exist as they were, and are not compiled again now."""
    now = {(v.kernel, v.label, target) for v, target in tasks}
    known = {(v.kernel, v.label): v for v in variants()}
    kept = [row for row in rows if (row["kernel"], row["label"], row["target"]) not in now]
    still = [(row, known[key]) for row in kept if (key := (row["kernel"], row["label"])) in known]
    return [{**row, "main": variant.main} for row, variant in still if variant.digest() == row["digest"]]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    used = " ".join(f"{n} {row[n]}" for n in ("registers", "stack", "shared") if n in row)
    sys.stdout.write(f"{row['target']:8} {row['kernel'].rpartition(':')[2]} {row['label']}: {used} {fault(row)}\n")
    sys.stdout.flush()
    return row


if __name__ == "__main__":
    raise SystemExit(main())
