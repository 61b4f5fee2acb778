"""Fixtures for every test: a clean environment, and fake platforms and kernels."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

import hal
from hal import _plugins, _selection
from hal_ops.attention import PHASES

_modules = itertools.count()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: tests run side by side already, and threads of each would wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No HAL_* variable, config file, ledger or measurement of the machine reaches a test."""
    for name in [n for n in os.environ if n.startswith("HAL_")]:
        monkeypatch.delenv(name)
    base = tmp_path_factory.mktemp("hal", numbered=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(base))
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    log = logging.getLogger("hal")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers
    _selection.failures.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; review the diff")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where an accelerator is, and are skipped elsewhere.

    There a warning is no error: vendors' libraries warn when they are imported or compile.
    """
    if hasattr(config, "workerinput"):
        items[:] = long_ones_early(items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    for item in marked:
        item.add_marker(pytest.mark.filterwarnings("default"))
    if marked and not any(d.platform != "cpu" and not d.unusable for d in hal.devices()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no usable accelerator on this machine"))


def long_ones_early(items: list[pytest.Item]) -> list[pytest.Item]:
    """The same tests, those marked ``long`` spread over the first quarter, between modules.

    xdist begins by giving each process a run of neighbours, a quarter of the tests in all. So each gets some of the long
    ones, and at the end no process waits for another one's.
    """
    early = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    step = len(others) / 4 / max(1, len(early))
    found: list[pytest.Item] = []
    begun = 0
    for place, item in enumerate(others):
        new_module = place == 0 or others[place - 1].path != item.path
        while new_module and begun < len(early) and place >= begun * step:
            found.append(early[begun])
            begun += 1
        found.append(item)
    return [*found, *early[begun:]]


FREE: dict[str, hal.Constraint] = {
    "num_q_heads": hal.Anything((2,)),
    "num_kv_heads": hal.Anything((1,)),
    "head_dim": hal.Anything((64,)),
    "v_head_dim": hal.Anything((64,)),
    "dtype": hal.OneOf("bfloat16", "float16", "float32"),
    "kv_dtype": hal.OneOf("bfloat16", "float16", "float32"),
    "page_size": hal.OneOf(16, 32, 64, 128),
    "kv_layout": hal.OneOf("NHD", "HND"),
    "max_q_len": hal.Range(1, 8),
    "causal": hal.OneOf(True, False),
}
"""A declaration that answers for every required field, and for no feature."""


@pytest.fixture
def attention_kernel() -> Callable[..., hal.Kernel]:
    """Declare an attention kernel over the reference; ``fields`` add to or replace parts of a plain declaration."""

    def make(name: str, *, fields: dict[str, hal.Constraint] | None = None, **changes: Any) -> hal.Kernel:
        phase = name.rpartition(".")[2]
        values: dict[str, Any] = {
            "op": "attention",
            "phase": phase,
            "target": f"hal_ops.attention.reference:{phase}",
            "priority": hal.Band.PLUGIN,
            "platforms": {"fake": hal.Archs()},
        }
        return hal.Kernel(name=name, fields={**FREE, **(fields or {})}, **{**values, **changes})

    return make


@pytest.fixture
def library(attention_kernel: Callable[..., hal.Kernel]) -> Callable[..., tuple[hal.Kernel, ...]]:
    """Declare one kernel a phase for a library."""

    def make(name: str, **changes: Any) -> tuple[hal.Kernel, ...]:
        return tuple(attention_kernel(f"{name}.{phase}", **changes) for phase in PHASES)

    return make


@pytest.fixture
def fake_platform() -> Iterator[Callable[..., Any]]:
    """Plug a platform in for the test: ``fake_platform(kernels=..., devices=2)``. Its devices run on the CPU."""
    with contextlib.ExitStack() as stack:

        def plug(
            name: str = "fake",
            *,
            kernels: Iterable[hal.Kernel] = (),
            devices: int = 1,
            archs: tuple[str, ...] = ("f10",),
            rank: int = 90,
            **methods: Any,
        ) -> type[hal.Platform]:
            platform = make_platform(name, tuple(kernels), devices, archs, rank, methods)
            stack.enter_context(_plugins.temporary_plugin(name, platform))
            return platform

        yield plug


def make_platform(
    platform_name: str,
    declared: tuple[hal.Kernel, ...],
    count: int,
    archs: tuple[str, ...],
    order: int,
    methods: dict[str, Any],
) -> type[hal.Platform]:
    def parse_arch(self: Any, text: str) -> hal.Arch:
        if not (text[:1] == "f" and text[1:].isdigit()):
            raise ValueError(f"{text!r} is no arch of platform {platform_name!r}: write f and a number, such as f10")
        return hal.Arch(platform_name, text, "f", (int(text[1:]),))

    def probe(self: Any, environ: Any) -> hal.Probe:
        found = tuple(
            hal.Device(
                platform=platform_name,
                arch=self.parse_arch(archs[i % len(archs)]),
                index=i,
                name=f"Fake {i}",
                runtime=hal.Version.parse("12.10"),
                driver=hal.Version.parse("500.1"),
                capabilities=self.capabilities(None),
            )
            for i in range(count)
        )
        return hal.Probe(found, (hal.Evidence("fake bus", f"{count} devices", count),))

    body: dict[str, Any] = {
        "name": platform_name,
        "vendor": "Fake Inc.",
        "rank": order,
        "runtime_name": "frt",
        "parse_arch": parse_arch,
        "probe": probe,
        "capabilities": lambda self, arch: frozenset({"bf16", "fp8_e4m3fn"}),
        "kernels": lambda self: declared,
        **methods,
    }
    return types.new_class(f"{platform_name.title()}Platform", (hal.Platform,), {}, lambda ns: ns.update(body))


@pytest.fixture
def kernel_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Make an importable module of functions; returns its name, for a kernel's target."""

    def make(**members: Any) -> str:
        name = f"hal_test_kernels_{next(_modules)}"
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return make


@pytest.fixture
def llama() -> dict[str, Any]:
    """The request of a Llama-3-8B layer."""
    return {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
