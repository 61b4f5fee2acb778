"""Probes leave no trace: no device context, no import of torch, no change of the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from hal._cpu_probe import probe_cpu
from hal._platform import Platform
from hal_musa import MusaPlatform
from hal_nvidia import NvidiaPlatform
from hal_rocm import RocmPlatform

PLATFORMS = [NvidiaPlatform, RocmPlatform, MusaPlatform]
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "0",
    "HIP_VISIBLE_DEVICES": "0",
    "MUSA_VISIBLE_DEVICES": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_environ_unchanged(platform: type[Platform], monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P49
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    platform().probe(MappingProxyType(before))
    probe_cpu(MappingProxyType(before))
    assert dict(os.environ) == before


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_changes_the_answer_is_declared(platform: type[Platform]) -> None:
    # requirement P49, X4
    assert platform.visibility
    assert all(name.isupper() for name in platform.visibility)
    assert platform.name == platform().name


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_machine_without_the_hardware_gives_evidence_and_no_error(platform: type[Platform]) -> None:
    # requirement P6, P9, P17
    found = platform().probe({platform.visibility[0]: "zero"})
    assert found.devices == ()
    assert found.evidence
    assert all(e.text for e in found.evidence)


_CHILD = """
    import json, os, sys, types
    from hal_musa import MusaPlatform
    from hal_nvidia import NvidiaPlatform
    from hal_rocm import RocmPlatform
    from hal._cpu_probe import probe_cpu

    if sys.argv[1] == "stub":
        def _lazy_init():
            raise RuntimeError("CUDA was started")
        def is_initialized():
            return False
        def get_device_properties(index):
            _lazy_init()
        for function in (_lazy_init, is_initialized, get_device_properties):
            function.__module__ = "torch.cuda"
        torch = types.ModuleType("torch")
        torch.version = types.SimpleNamespace(cuda="13.0", hip=None, musa=None)
        torch.cuda = types.SimpleNamespace(
            _lazy_init=_lazy_init, is_initialized=is_initialized, get_device_properties=get_device_properties,
            device_count=_lazy_init, is_available=_lazy_init,
        )
        torch.musa = types.SimpleNamespace(is_initialized=is_initialized, device_count=_lazy_init)
        sys.modules["torch"] = torch
    probes = [p().probe(os.environ) for p in (NvidiaPlatform, RocmPlatform, MusaPlatform)] + [probe_cpu(os.environ)]
    heavy = [m for m in ("torch", "numpy", "triton", "pynvml", "amdsmi", "torch_musa") if m in sys.modules]
    json.dump({"evidence": [str(e) for p in probes for e in p.evidence], "loaded": heavy}, sys.stdout)
"""


@pytest.mark.parametrize("how", ["plain", "stub"])
def test_probing_imports_no_torch_and_starts_no_runtime(how: str) -> None:
    # requirement P16, X8
    paths = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
    command = [sys.executable, "-c", textwrap.dedent(_CHILD), how]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["loaded"]) - {"pynvml"} == ({"torch"} if how == "stub" else set())
    assert len(told["evidence"]) >= 4


def _fail() -> None:
    raise RuntimeError("NVML Shared Library Not Found")


def test_a_machine_with_both_libraries_yields_one_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P2
    from hal_nvidia._system import System as NvidiaSystem
    from hal_rocm._system import System as RocmSystem

    build = {"torch": "2.9.0+rocm6.4", "hip": "6.4.0"}
    monkeypatch.setattr("hal_nvidia._system.torch_build", lambda: build)
    monkeypatch.setattr("hal_rocm._system.torch_build", lambda: build)
    node = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    (node / "mem_banks/0").mkdir(parents=True)
    (node / "gpu_id").write_text("1\n")
    (node / "properties").write_text("simd_count 320\nsimd_per_cu 4\ngfx_target_version 90402\ndrm_render_minor 128\n")
    (node / "mem_banks/0/properties").write_text("heap_type 1\nsize_in_bytes 1024\n")
    (tmp_path / "dev/dri").mkdir(parents=True)
    for name in ("dev/nvidiactl", "dev/kfd", "dev/dri/renderD128"):
        (tmp_path / name).touch()
    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=_fail)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("libcuda was asked"))
    assert NvidiaPlatform(NvidiaSystem(tmp_path)).probe({}).devices == ()
    assert [d.arch.name for d in RocmPlatform(RocmSystem(tmp_path)).probe({}).devices] == ["gfx942"]
