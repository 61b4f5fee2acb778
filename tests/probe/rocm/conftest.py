"""Machines with AMD GPUs, rebuilt from recorded KFD topologies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._device import Probe
from hal_rocm import RocmPlatform
from hal_rocm._system import SourceError, System

FIXTURES = Path(__file__).parents[2] / "fixtures" / "kfd"
ROCM_TORCH = {"torch": "2.9.0+rocm6.4", "hip": "6.4.43482-0f2d60242"}


class Machine(System):
    """A machine whose files lie in a folder; what is not a file is given by keyword."""

    def __init__(
        self,
        root: Path,
        *,
        build: Mapping[str, str] = ROCM_TORCH,
        torch: Any = None,
        amdsmi: Any = None,
        locked: tuple[str, ...] = (),
    ) -> None:
        super().__init__(root)
        self._build, self._torch, self._amdsmi, self._locked = build, torch, amdsmi, locked

    def torch(self) -> Any:
        return self._torch

    def torch_build(self) -> Mapping[str, str]:
        return self._build

    def may_open(self, path: str) -> bool:
        return path not in self._locked

    def amdsmi(self, environ: Mapping[str, str]) -> Any:
        if self._amdsmi is None:
            raise SourceError("amdsmi is not installed", "install it")
        return self._amdsmi


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def _lines(facts: Mapping[str, int]) -> str:
    return "\n".join(f"{name} {value}" for name, value in facts.items())


def _build(root: Path, recorded: Mapping[str, Any]) -> None:
    for number, node in recorded["nodes"].items():
        folder = root / "sys/class/kfd/kfd/topology/nodes" / number
        _write(folder / "gpu_id", str(node["gpu_id"]))
        _write(folder / "properties", _lines(node["properties"]))
        for index, bank in enumerate(node["banks"]):
            _write(folder / "mem_banks" / str(index) / "properties", _lines(bank))
        render = node["properties"]["drm_render_minor"]
        if render:
            _write(root / f"dev/dri/renderD{render}", "")
        for fact in ("product_name", "revision"):
            if fact in node:
                _write(root / f"sys/class/drm/renderD{render}/device" / fact, node[fact])
    _write(root / "dev/kfd", "")
    _write(root / "proc/sys/kernel/osrelease", "6.8.0-45-generic")
    if recorded["driver"]:
        _write(root / "sys/module/amdgpu/version", recorded["driver"])


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """Name of a recorded machine to the folder that holds its files."""

    def build(name: str) -> Path:
        root = tmp_path / name
        _build(root, json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8")))
        return root

    return build


@pytest.fixture
def probe(tree: Callable[[str], Path]) -> Callable[..., Probe]:
    """Probe a recorded machine, with an environment and with what :class:`Machine` takes."""

    def ask(name: str, environ: Mapping[str, str] | None = None, **facts: Any) -> Probe:
        return RocmPlatform(Machine(tree(name), **facts)).probe(environ or {})

    return ask


@pytest.fixture
def machine() -> type[Machine]:
    return Machine


def _properties(name: str, arch: str, units: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, gcnArchName=arch, total_memory=25 * 10**9, multi_processor_count=units)


@pytest.fixture
def hip_torch() -> Callable[..., Any]:
    """A torch that looks like a HIP build: one RX 7900 XTX, 48 work group processors."""

    def make(*, initialised: bool = True, home: str = "torch.cuda") -> Any:
        def get_device_properties(index: int) -> SimpleNamespace:
            return _properties("AMD Radeon RX 7900 XTX", "gfx1100", 48)

        get_device_properties.__module__ = home
        cuda = SimpleNamespace(
            get_device_properties=get_device_properties, device_count=lambda: 1, is_initialized=lambda: initialised
        )
        return SimpleNamespace(version=SimpleNamespace(hip="6.4", cuda=None), cuda=cuda)

    return make
