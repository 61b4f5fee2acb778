"""The CPU device, from recorded ``/proc`` files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal import _cpu_probe
from hal._cpu_probe import probe_cpu
from hal._device import Device

SAPPHIRE_RAPIDS = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8
"""
GRACE = """\
processor\t: 0
BogoMIPS\t: 2000.00
Features\t: fp asimd evtstrm aes sve sve2 bf16 i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""
MIXED_ARM = """\
processor\t: 0
Features\t: fp asimd sve
CPU implementer\t: 0x48
CPU part\t: 0xd01

processor\t: 1
Features\t: fp asimd
CPU implementer\t: 0x48
CPU part\t: 0xd01
"""


def _probe(root: Path, cpuinfo: str, meminfo: str = "MemTotal:       16384 kB\nMemFree: 1 kB\n") -> Device:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(cpuinfo)
    (root / "proc/meminfo").write_text(meminfo)
    (device,) = probe_cpu({}, root).devices
    return device


@pytest.mark.parametrize(
    ("cpuinfo", "name", "has", "lacks"),
    [
        (
            SAPPHIRE_RAPIDS,
            "Intel(R) Xeon(R) Platinum 8480+",
            {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"},
            {"neon", "sve", "amx_fp16"},
        ),
        (GRACE, "Arm Neoverse-V2", {"neon", "sve", "sve2"}, {"avx2"}),
        (MIXED_ARM, "Arm implementer 0x48, part 0xd01", {"neon"}, {"sve"}),
    ],
    ids=["x86", "arm", "mixed"],
)
def test_recorded_processors(tmp_path: Path, cpuinfo: str, name: str, has: set[str], lacks: set[str]) -> None:
    device = _probe(tmp_path, cpuinfo)
    assert device.name == name
    assert has <= device.capabilities
    assert not lacks & device.capabilities
    assert {"fp16", "bf16", "fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "deterministic"} <= device.capabilities
    assert device.memory == 16 << 20


def test_the_cores_are_those_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert _probe(tmp_path, SAPPHIRE_RAPIDS).multiprocessors == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert _probe(tmp_path, SAPPHIRE_RAPIDS).multiprocessors == 7


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Plan9", "?? 9000")])
def test_systems_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    # requirement P17
    monkeypatch.setattr(_cpu_probe.platform, "system", lambda: system)
    monkeypatch.setattr(_cpu_probe.platform, "machine", lambda: machine)
    monkeypatch.setattr(_cpu_probe.platform, "processor", lambda: "")
    monkeypatch.delattr(os, "sysconf")
    (device,) = probe_cpu({}, tmp_path).devices
    assert device.arch.name == {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, "unknown")
    assert (device.name, device.memory) == (machine, None)
    assert device.multiprocessors


@pytest.mark.parametrize(
    ("build", "words"), [({}, "torch is not installed: pip install torch"), ({"torch": "2.13.0+cpu"}, "")]
)
def test_without_torch_the_cpu_is_there_and_unusable(
    monkeypatch: pytest.MonkeyPatch, build: dict[str, str], words: str
) -> None:
    # requirement P1, X8
    monkeypatch.setattr(_cpu_probe, "torch_build", lambda: build)
    (device,) = probe_cpu({}).devices
    assert device.unusable == words
    assert device.runtime.known == bool(build)


def test_no_variable_hides_the_cpu() -> None:
    # requirement P17
    assert len(probe_cpu({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}).devices) == 1


@given(cpuinfo=st.text(max_size=300), meminfo=st.text(max_size=100))
def test_odd_files_never_raise(tmp_path_factory: pytest.TempPathFactory, cpuinfo: str, meminfo: str) -> None:
    root = tmp_path_factory.mktemp("odd")
    (root / "proc").mkdir()
    for name, text in (("cpuinfo", cpuinfo), ("meminfo", meminfo)):
        (root / "proc" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    (device,) = probe_cpu({}, root).devices
    assert device.platform == "cpu"
    assert device.name
