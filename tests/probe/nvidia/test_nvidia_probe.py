"""NVIDIA devices: sources, facts, and what is told where there are none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._arch import Arch
from hal._device import Device, Probe
from hal._version import Version
from hal_nvidia import NvidiaPlatform
from hal_nvidia._system import System

Ask = Callable[..., Probe]
GIB = 1 << 30


def test_eight_h200(probe: Ask, records: Any) -> None:
    found = probe(records.H200S)
    first, last = found.devices[0], found.devices[7]
    assert (first.id, first.name, first.arch.name) == ("nvidia:0", "NVIDIA H200", "sm_90")
    assert (first.memory, first.multiprocessors, first.pci) == (143771 << 20, 132, "0000:18:00.0")
    assert first.uuid == "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    assert (first.driver, first.runtime) == (Version.parse("580.159.04"), Version.parse("13.0"))
    assert dict(first.properties) == {"source": "NVML", "cuda_driver": "13.0", "p2p_known": True}
    assert (first.unusable, first.torch_type, last.index, last.pci) == ("", "cuda", 7, "0000:db:00.0")
    assert {"wgmma", "fp8_e4m3fn", "bf16"} <= first.capabilities
    assert str(found.evidence[0]) == "NVML: 8 GPUs, driver 580.159.04, CUDA 13.0"
    assert json.dumps(first.as_dict())


def test_nvml_is_started_and_stopped_once_a_probe(records: Any, tmp_path: Path) -> None:
    nvml = records.Nvml(records.H200S)
    platform = NvidiaPlatform(records.Machine(tmp_path, nvml=nvml))
    platform.probe({})
    platform.probe({})
    assert (nvml.started, nvml.stopped) == (2, 2)


def test_bytes_from_older_bindings_are_read(probe: Ask, records: Any) -> None:
    gpu = records.replace(records.H100, name=b"NVIDIA H100 PCIe", uuid=b"GPU-90909090")
    device = probe(None, nvml=records.Nvml((gpu,), driver=b"550.54.15")).devices[0]
    assert (device.name, device.uuid, str(device.driver)) == ("NVIDIA H100 PCIe", "GPU-90909090", "550.54.15")


def test_what_nvml_does_not_tell_is_none_and_is_said(probe: Ask, records: Any) -> None:
    # requirement P11
    silent = frozenset({"nvmlDeviceGetMemoryInfo", "nvmlDeviceGetNumGpuCores"})
    found = probe((records.replace(records.T4, silent=silent),))
    assert (found.devices[0].memory, found.devices[0].multiprocessors) == (None, None)
    assert "does not tell nvmlDeviceGetMemoryInfo: Not Supported" in found.evidence[0].text
    assert "MigMode" not in found.evidence[0].text


def test_a_lost_gpu_is_there_and_unusable(probe: Ask, records: Any) -> None:
    # requirement P14
    gpus = (records.H200S[0], records.replace(records.H200S[1], lost=True))
    found = probe(gpus, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [d.unusable for d in found.devices] == ["", "NVML cannot open GPU 1: GPU is lost"]
    assert found.devices[1].arch.name == "unknown"
    assert found.devices[1].capabilities == frozenset()


def test_a_gpu_without_a_compute_capability_is_unusable(probe: Ask, records: Any) -> None:
    gpu = records.replace(records.T4, silent=frozenset({"nvmlDeviceGetCudaComputeCapability"}))
    assert probe((gpu,)).devices[0].unusable == "its compute capability could not be learnt"


@pytest.mark.parametrize("fails", ["NVML Shared Library Not Found", "Driver/library version mismatch", "Unknown Error"])
def test_the_driver_answers_where_nvml_does_not(probe: Ask, records: Any, fails: str) -> None:
    # requirement P10
    driver = [records.row(records.H100, 114)]
    found = probe(None, nvml=records.Nvml((), fails=fails), driver=driver)
    device = found.devices[0]
    assert (device.arch.name, device.multiprocessors, device.pci) == ("sm_90", 114, "0000:41:00.0")
    assert device.uuid == records.H100.uuid
    assert dict(device.properties)["p2p_known"] is False
    assert [(e.source, e.found) for e in found.evidence] == [("NVML", 0), ("CUDA driver", 1)]
    assert fails in found.evidence[0].text


def test_the_driver_gets_this_environment_and_its_order_is_kept(records: Any, tmp_path: Path) -> None:
    # requirement P10, P14
    rows = [records.row(records.H100, 114), records.row(records.T4, 40)]
    machine = records.Machine(tmp_path, driver=rows)
    environ = {"CUDA_VISIBLE_DEVICES": "1,0"}
    found = NvidiaPlatform(machine).probe(environ)
    assert machine.asked == [environ]
    assert [d.arch.name for d in found.devices] == ["sm_90", "sm_75"]


def test_a_jetson_without_nvml_is_a_cuda_device(probe: Ask, records: Any) -> None:
    # requirement P11
    orin = records.Gpu("Orin", (8, 7), 64 * GIB, 0, "GPU-0b0b0b0b-0000-4106-c12f-20bd9faed9f6", "")
    found = probe(None, driver=[records.row(orin, 16, integrated=1)], tegra=True)
    device = found.devices[0]
    assert (device.name, device.arch.name, device.multiprocessors) == ("Orin", "sm_87", 16)
    facts = dict(device.properties)
    assert (facts["p2p_known"], facts["integrated"]) == (False, True)


def test_a_jetson_whose_gpu_does_not_answer_is_told(probe: Ask) -> None:
    # requirement P9, P11
    found = probe(None, tegra=True)
    assert found.devices == ()
    assert found.evidence[-1].source == "Tegra"
    assert found.evidence[-1].remedy


def test_an_initialised_torch_is_the_last_source(probe: Ask, cuda_torch: Any) -> None:
    # requirement P10
    found = probe(None, torch=cuda_torch())
    assert [(d.name, d.arch.name, d.pci) for d in found.devices] == [("NVIDIA H200", "sm_90", "0000:18:00.0")]
    assert [e.source for e in found.evidence] == ["NVML", "CUDA driver", "torch"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"initialised": False}, "is not initialised to ask"),
        ({"hip": "6.4"}, "built for hip 6.4"),
        ({"musa": "4030"}, "built for musa 4030"),
        ({"cuda": None}, "built without CUDA"),
        ({"home": "torch_musa.core.device"}, "comes from torch_musa.core.device: torch.cuda is patched"),
        ({"home": "torch_npu.npu.utils"}, "comes from torch_npu.npu.utils: torch.cuda is patched"),
    ],
)
def test_torch_is_not_asked_when_that_would_start_it_or_mislead(
    probe: Ask, cuda_torch: Any, how: dict[str, Any], words: str
) -> None:
    # requirement X14, P16, P2
    found = probe(None, torch=cuda_torch(**how))
    assert found.devices == ()
    assert words in found.evidence[2].text


def test_nvmls_vendor_is_right_whatever_torch_cuda_became(probe: Ask, records: Any, cuda_torch: Any) -> None:
    # requirement X14
    found = probe(records.H200S[:1], torch=cuda_torch(home="torch_npu.npu.utils"))
    assert [d.platform for d in found.devices] == ["nvidia"]


def test_nothing_found_gives_one_line_a_source(probe: Ask) -> None:
    # requirement P9, P17, P6
    found = probe(None)
    assert found.devices == ()
    assert [str(e) for e in found.evidence] == [
        "NVML: pynvml cannot be imported; pip install nvidia-ml-py",
        "CUDA driver: not asked: there is no driver here",
        "torch: not imported here, and not imported to ask",
    ]


@pytest.mark.parametrize("build", [{"torch": "2.9+rocm6.4", "hip": "6.4"}, {"torch": "2.7.1", "musa": "4.3"}])
def test_a_libcuda_beside_another_vendors_torch_is_not_asked(
    records: Any, tmp_path: Path, build: dict[str, str]
) -> None:
    # requirement P2
    machine = records.Machine(tmp_path, driver=[records.row(records.H100, 114)], build=build)
    found = NvidiaPlatform(machine).probe({})
    assert found.devices == ()
    assert machine.asked == []
    assert "torch is built for" in found.evidence[1].text


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ({}, "torch is not installed: install a CUDA build of torch"),
        ({"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is built without CUDA: install a CUDA build of torch"),
        ({"torch": "2.9.0+rocm6.4", "hip": "6.4"}, "torch 2.9.0+rocm6.4 is built for ROCm 6.4, not for CUDA"),
        ({"torch": "2.7.1", "musa": "4.3.0"}, "torch 2.7.1 is built for MUSA 4.3.0, not for CUDA"),
        (
            {"torch": "3.0+cu140", "cuda": "14.0"},
            "torch 3.0+cu140 is built for CUDA 14.0, but the driver ends at CUDA 13.0",
        ),
    ],
)
def test_devices_that_torch_cannot_use_say_why(probe: Ask, records: Any, build: dict[str, str], words: str) -> None:
    # requirement P1, P2, P6
    found = probe(records.H200S[:2], build=build)
    assert len(found.devices) == 2
    assert all(d.unusable.startswith(words) for d in found.devices)
    assert any(e.source == "torch build" and e.text.startswith(words) for e in found.evidence)


def test_an_older_runtime_than_the_drivers_is_fine(probe: Ask, records: Any) -> None:
    found = probe(records.H200S[:1], build={"torch": "2.8.0+cu126", "cuda": "12.6"})
    assert found.devices[0].unusable == ""
    assert found.devices[0].runtime == Version.parse("12.6")


def test_without_a_cuda_torch_the_runtime_is_the_drivers(probe: Ask, records: Any) -> None:
    assert probe(records.H200S[:1], build={}).devices[0].runtime == Version.parse("13.0")


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("garbage", "wrote 'garbage', which is no answer"),
        ('{"error": "cuInit failed: CUDA_ERROR_NO_DEVICE (100)"}', "CUDA_ERROR_NO_DEVICE (100)"),
        ('{"cuda": 13000, "devices": []}', "shows no GPU"),
    ],
)
def test_a_driver_that_does_not_answer_is_evidence(probe: Ask, driver: str, words: str) -> None:
    # requirement P10
    found = probe(None, driver=driver)
    assert found.devices == ()
    assert words in found.evidence[1].text


def test_without_device_nodes_no_child_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no process may be started here")

    monkeypatch.setattr("subprocess.run", refuse)
    with pytest.raises(Exception, match="none of /dev/nvidiactl"):
        System(tmp_path).ask_driver({})


def test_the_child_process_answers_on_any_machine(tmp_path: Path) -> None:
    # requirement P10
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    answer = json.loads(System(tmp_path).ask_driver({"PATH": ""}))
    assert "error" in answer or answer["devices"] is not None


def test_moore_threads_bindings_under_nvmls_name_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # requirement X14
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(mtmlLibraryInit=None, nvmlInit=None))
    with pytest.raises(Exception, match="pymtml, not NVML"):
        System(tmp_path).nvml()


def test_without_a_driver_nvml_is_not_even_imported(tmp_path: Path) -> None:
    # requirement P10, P16
    with pytest.raises(Exception, match="not asked: none of /dev/nvidiactl"):
        System(tmp_path).nvml()


def test_the_real_bindings_have_every_call(records: Any) -> None:
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in sorted(records.Nvml.calls()) if not hasattr(pynvml, name)] == []
    assert issubclass(pynvml.NVMLError, Exception)


@pytest.mark.parametrize(
    ("arch", "name", "expected", "units", "gib"),
    [
        ("sm_75", "", "Tesla T4", 40, 16),
        ("sm_80", "", "NVIDIA A100-SXM4-80GB", 108, 80),
        ("sm_89", "", "NVIDIA L40S", 142, 48),
        ("sm_90", "", "NVIDIA H100 80GB HBM3", 132, 80),
        ("sm_90", "H200", "H200", 132, 140),
        ("sm_100", "", "NVIDIA B200", 148, 180),
        ("sm_120", "RTX 5090", "RTX 5090", 170, 32),
        ("sm_139", "", "", None, None),
        ("sm_90", "H900", "H900", None, None),
    ],
)
def test_simulated_devices_get_what_the_product_has(
    arch: str, name: str, expected: str, units: int | None, gib: int | None
) -> None:
    platform = NvidiaPlatform()
    done = platform.simulate(Device(platform="nvidia", arch=platform.parse_arch(arch), name=name, simulated=True))
    assert (done.name, done.multiprocessors, done.torch_type) == (expected, units, "cuda")
    assert (None if done.memory is None else round(done.memory / GIB)) == gib
    assert done.capabilities == platform.capabilities(done.arch)


def test_simulation_keeps_what_is_given() -> None:
    given = Device(platform="nvidia", arch=Arch("nvidia", "sm_90", "sm", (9, 0)), memory=1, multiprocessors=2)
    done = NvidiaPlatform().simulate(given)
    assert (done.memory, done.multiprocessors) == (1, 2)


def test_libraries_are_named_with_their_distributions() -> None:
    libraries = {library.name: library for library in NvidiaPlatform().libraries()}
    assert libraries["flash-attn-3"].names() == ("flash-attn-3", "tokenspeed-fa3")
    assert {"torch", "triton", "flash-attn", "flash-attn-4", "flashinfer-python"} <= libraries.keys()
    assert all(library.install and library.module for library in libraries.values())
