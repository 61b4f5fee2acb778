"""Real distributions in temporary folders: metadata, entry points and modules that tests write."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins

_numbers = itertools.count()

_PLATFORM = """
class Plugin(hal.Platform):
    name = "{name}"
    vendor = "Test"

    def probe(self, environ):
        arch = self.parse_arch("x1")
        device = hal.Device(platform="{name}", arch=arch, capabilities=self.capabilities(arch))
        return hal.Probe((device,), (hal.Evidence("test bus", "one device", 1),))

    def parse_arch(self, text):
        return hal.Arch("{name}", text, "x", (1,))

    def capabilities(self, arch):
        return frozenset({{"bf16"}})
"""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Install a distribution with one plugin; returns the name of the plugin's module.

    ``members`` are lines of the platform's class, after those that make it work: a later definition wins. ``head`` goes
    before the class, ``tail`` after it. Only torch-hal's own plugins and those installed here are seen, whatever the
    machine has.
    """
    seen = {"torch-hal"}
    modules: list[str] = []
    every = _plugins._entry_points

    def mine() -> list[importlib.metadata.EntryPoint]:
        return [entry for entry in every() if entry.dist is not None and entry.dist.name in seen]

    def put(
        name: str, *, members: str = "", head: str = "", tail: str = "", distribution: str = "", version: str = "1.2"
    ) -> str:
        distribution = distribution or f"{name}-hal"
        module = f"hal_test_plugin_{next(_numbers)}"
        folder = tmp_path / module
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[hal.platforms]\n{name} = {module}:Plugin\n")
        body = textwrap.indent(textwrap.dedent(members), "    ")
        parts = ("import hal", textwrap.dedent(head), _PLATFORM.format(name=name), body, textwrap.dedent(tail))
        (folder / f"{module}.py").write_text("\n".join(parts))
        monkeypatch.syspath_prepend(str(folder))
        seen.add(distribution)
        modules.append(module)
        hal.reset()
        return module

    monkeypatch.setattr(_plugins, "_entry_points", mine)
    hal.reset()
    yield put
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    hal.reset()


@pytest.fixture
def status() -> Callable[[str], hal.PluginRecord]:
    """What became of one plugin."""

    def find(name: str) -> hal.PluginRecord:
        return next(record for record in hal.plugins() if record.name == name)

    return find


@pytest.fixture
def decisions() -> Callable[[], dict[str, Any]]:
    """What is decided for the CPU: every request here, with every candidate's reasons."""

    def decide() -> dict[str, Any]:
        common: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
        requests: list[dict[str, Any]] = [
            {},
            {"softcap": 20.0},
            {"window": 16},
            {"kv_dtype": "float8_e5m2", "return_lse": True},
        ]
        from hal_ops.attention import AttentionRequest

        picked = [hal.select(AttentionRequest(**common, **fields), device="cpu") for fields in requests]
        return {str(i): selection.as_dict()["phases"] for i, selection in enumerate(picked)}

    return decide


KERNEL = """
def kernel(name, **changes):
    fields = {n: hal.Anything() for n in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim", "dtype", "causal")}
    values = {"op": "attention", "phase": "prefill", "target": "not_there:prefill", "priority": hal.Band.PLUGIN}
    return hal.Kernel(name=name, fields=fields, **{**values, **changes})
"""


@pytest.fixture
def kernel_source() -> str:
    """Source of ``kernel(name, **changes)``, for ``head``: a prefill kernel of a declaration that is in order."""
    return KERNEL
