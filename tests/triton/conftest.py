"""Tests of the Triton kernels: on the accelerator where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton is imported, and other tests of the same process may have imported it.
So without an accelerator each module here becomes one test that runs the module in a pytest process of its own, with
``TRITON_INTERPRET=1``; to pick single tests, set that variable yourself. Modules called ``test_aot*`` or
``test_plain*`` compile, or need no Triton, and run in the process at hand.

The interpreter is patched here, not in the library, where a version needs it; see :func:`_patch_interpreter`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hal

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SECONDS = 900
FP8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}


def has_accelerator() -> bool:
    return any(d.platform != "cpu" and not d.unusable for d in hal.devices())


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "triton"))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if INTERPRETED or module_path.name.startswith(("test_aot", "test_plain")) or has_accelerator():
        return None
    return InterpretedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs a device or a compiler; this process has Triton's interpreter")
    # numpy warns of log(0) and of infinities that a GPU computes with silently, as the kernels mean it to.
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    for item in (i for i in items if HERE in i.path.parents):
        item.add_marker(quiet)
        if item.get_closest_marker("gpu") or item.path.name.startswith("test_aot"):
            item.add_marker(skip)


class InterpretedModule(pytest.File):
    """One module of tests, run by :class:`InterpretedRun`."""

    def collect(self) -> Iterator[pytest.Item]:
        run = InterpretedRun.from_parent(self, name="interpreted")
        run.add_marker("long")
        yield run


class InterpretedRun(pytest.Item):
    """A pytest process of its own over the module."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", str(self.path), "-q", "--no-header", "-rfE"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        if self.config.option.markexpr:
            command += ["-m", self.config.option.markexpr]
        done = subprocess.run(
            command,
            cwd=self.config.rootpath,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        self.add_report_section("call", "interpreter", done.stdout)
        if done.returncode != 0:
            raise InterpretedError(f"exit status {done.returncode} of {' '.join(command)}\n{done.stdout}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, InterpretedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


class InterpretedError(Exception):
    """Tests failed in the process of their own, or there were none."""


def _environment() -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**kept, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _version(module: ModuleType) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


def _patch_interpreter() -> None:
    """Repair what a version of the interpreter gets wrong.

    Loop bounds that are arguments: ``int()`` of an array of one element fails with numpy 2.4 in Triton 3.6
    (triton-lang/triton#9171). ``tl.dot`` of bfloat16 multiplies bit patterns, in 3.6 to 3.9 (#11584). Rounding to FP8
    loses the carry into the exponent (1.99 becomes 1.0), in 3.6 to 3.9 (``_convert_float`` in ``interpreter.py``).
    """
    import numpy as np
    import triton
    from triton.runtime import interpreter

    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        patch = interpreter._patch_lang_tensor

        def patch_lang_tensor(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_lang_tensor
    if _version(triton) < (3, 10):
        _patch_dot(interpreter.InterpreterBuilder)
        _patch_fp8(interpreter.InterpreterBuilder)
    if hasattr(interpreter, "_LangPatchScope"):
        _hasten(interpreter)


def _hasten(interpreter: Any) -> None:
    """Leave out what the interpreter does over and over, or for nothing; three quarters of its time were that."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # It computes each sum of integers again in 64 bits, and asserts nothing of it unless it debugs.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    formats: dict[str, Any] = {}
    np_dtype = interpreter._get_np_dtype

    def kept_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in formats:
            formats[name] = np_dtype(dtype)
        return formats[name]

    interpreter._get_np_dtype = kept_np_dtype
    _patch_language_once(interpreter)


def _patch_language_once(interpreter: Any) -> None:
    """Triton's functions are replaced once a launch and module, not again for each call of a device function."""
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        patched.add(module)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def _patch_dot(builder: Any) -> None:
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *others)

    builder.create_dot = create_dot


def _patch_fp8(builder: Any) -> None:
    from triton.runtime.interpreter import TensorHandle

    convert = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        formats = str(source.dtype.scalar), str(target.scalar)
        if target.scalar.primitive_bitwidth != 8 or formats[0] != "fp32" or formats[1] not in FP8:
            return convert(self, source, target, rounding)
        values = torch.from_numpy(source.data).to(FP8[formats[1]])
        return TensorHandle(values.view(torch.uint8).numpy(), target.scalar)

    builder.create_fp_to_fp = create_fp_to_fp


def _widened(handle: Any) -> Any:
    """A bfloat16 handle, which the interpreter keeps as uint16, as float32; any other as it is."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


if INTERPRETED:
    _patch_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: ``"cuda"`` (ROCm's too), or ``"cpu"`` in the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="session")
def interpreted() -> bool:
    return INTERPRETED


def load(name: str) -> ModuleType:
    """A module beside this file, such as ``aot``."""
    full = f"hal_triton_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def aot() -> ModuleType:
    """Ahead-of-time compilation: ``tests/triton/aot.py``."""
    return load("aot")


@pytest.fixture(scope="session")
def assert_right() -> Callable[[Any], None]:
    """Fails with the report of each comparison that is not right."""

    def check(comparisons: Any) -> None:
        assert comparisons, "nothing was compared"
        wrong = [c.report() for c in comparisons if not c.ok]
        assert not wrong, "\n".join(wrong)

    return check
