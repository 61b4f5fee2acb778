"""AMD devices from recorded KFD topologies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._arch import Arch
from hal._device import Device, Probe
from hal._version import Version
from hal_rocm import RocmPlatform
from hal_rocm._system import System

Ask = Callable[..., Probe]
GIB = 1 << 30

MACHINES = [
    # fixture, archs, compute units, GiB (rounded), first PCI address, first name
    ("mi210", ["gfx90a"] * 2, 104, 64, "0000:63:00.0", "AMD Instinct MI210"),
    ("mi300x8", ["gfx942"] * 8, 304, 192, "0000:0c:00.0", "AMD Instinct MI300X OAM"),
    ("mi308x_cpx", ["gfx942"], 20, 48, "0000:a4:00.2", "AMD Instinct MI308X"),
    ("mi355x", ["gfx950"] * 2, 256, 288, "0000:15:00.0", "AMD Instinct MI355X"),
    ("rx7900xtx", ["gfx1100"], 96, 24, "0000:86:00.0", ""),
    ("igpu_dgpu", ["gfx1100", "gfx1036"], 96, 24, "0000:03:00.0", ""),
    ("hygon", ["gfx936"], 80, 64, "0000:05:00.0", ""),
]


@pytest.mark.parametrize(("name", "archs", "units", "memory", "pci", "product"), MACHINES, ids=[m[0] for m in MACHINES])
def test_recorded_machines(
    probe: Ask, name: str, archs: list[str], units: int, memory: int, pci: str, product: str
) -> None:
    # requirement X16, P18
    found = probe(name)
    first = found.devices[0]
    assert [d.arch.name for d in found.devices] == archs
    assert [d.index for d in found.devices] == list(range(len(archs)))
    assert first.multiprocessors == units
    assert first.memory is not None
    assert round(first.memory / GIB) == memory
    assert (first.pci, first.name, first.unusable, first.torch_type) == (pci, product, "", "cuda")
    assert first.runtime == Version.parse("6.4.43482")
    assert found.evidence[0].source == "KFD"
    assert found.evidence[0].found == len(archs)


def test_uuid_is_the_unique_id_as_rocm_writes_it(probe: Ask) -> None:
    assert probe("mi210").devices[0].uuid == "GPU-1901ead3a2ecd4a6"
    assert probe("igpu_dgpu").devices[1].uuid == ""


def test_memory_is_the_cards_own(machine: Any, tree: Any) -> None:
    root = tree("rx7900xtx")
    banks = root / "sys/class/kfd/kfd/topology/nodes/1/mem_banks"
    for index, heap in ((1, 0), (2, 2)):
        (banks / str(index)).mkdir()
        (banks / str(index) / "properties").write_text(f"heap_type {heap}\nsize_in_bytes 4096\n")
    assert RocmPlatform(machine(root)).probe({}).devices[0].memory == 25753026560 + 4096


def test_an_unknown_arch_keeps_its_name_and_claims_nothing(probe: Ask) -> None:
    # requirement X16
    device = probe("hygon").devices[0]
    assert (device.arch.name, device.arch.line, device.capabilities) == ("gfx936", "", frozenset())


def test_capabilities_are_each_devices_own(probe: Ask) -> None:
    # requirement P15, X7, P29
    dgpu, igpu = probe("igpu_dgpu").devices
    assert "wmma" in dgpu.capabilities
    assert "wmma" not in igpu.capabilities
    assert "fp8_e4m3fnuz" in probe("mi300x8").devices[3].capabilities
    assert "fp8_e4m3fn" in probe("mi355x").devices[1].capabilities


def test_the_driver_is_the_modules_or_else_the_kernels(probe: Ask) -> None:
    # requirement E2
    assert probe("mi210").devices[0].driver == Version.parse("6.8.5")
    assert probe("rx7900xtx").devices[0].driver.release == (6, 8, 0)


def test_a_driver_that_states_no_gfx_target_leaves_the_arch_unknown(probe: Ask) -> None:
    # requirement X16, P14
    device = probe("vega10_old").devices[0]
    assert device.arch.name == "unknown"
    assert "gfx_target_version" in device.unusable


def test_no_kfd_is_evidence_and_no_error(machine: Any, tmp_path: Path) -> None:
    # requirement P6, P9, P17
    found = RocmPlatform(machine(tmp_path)).probe({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"})
    assert found.devices == ()
    assert [e.source for e in found.evidence] == ["KFD", "torch"]
    assert "install the amdgpu driver" in str(found.evidence[0])


def test_a_container_without_dev_kfd_has_no_device_and_says_what_to_pass(machine: Any, tree: Any) -> None:
    # requirement P6
    root = tree("mi300x8")
    (root / "dev/kfd").unlink()
    found = RocmPlatform(machine(root)).probe({})
    assert found.devices == ()
    assert "8 GPUs" in found.evidence[0].text
    assert "--device=/dev/kfd" in found.evidence[0].remedy


def test_gpus_without_their_render_node_are_left_out(machine: Any, tree: Any) -> None:
    root = tree("mi300x8")
    for minor in (128, 144):
        (root / f"dev/dri/renderD{minor}").unlink()
    found = RocmPlatform(machine(root)).probe({})
    assert [d.pci for d in found.devices][:2] == ["0000:22:00.0", "0000:5c:00.0"]
    assert [d.index for d in found.devices] == list(range(6))
    assert "node 2 has no /dev/dri/renderD128 here" in found.evidence[0].text


def test_gpus_that_the_cgroup_hides_are_left_out(machine: Any, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("mi300x8")
    read = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "properties" and path.parent.name in ("2", "3"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    found = RocmPlatform(machine(root)).probe({})
    assert len(found.devices) == 6
    assert "node 2 is hidden from this process" in found.evidence[0].text


def test_a_user_outside_the_groups_is_told(probe: Ask) -> None:
    # requirement P6
    device = probe("mi210", locked=("dev/kfd",)).devices[0]
    assert "may not open /dev/kfd" in device.unusable
    assert "groups render and video" in device.unusable
    assert probe("mi210", locked=("dev/dri/renderD129",)).devices[1].unusable


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ({}, "torch is not installed: install a ROCm build of torch"),
        ({"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is built without ROCm: install a ROCm build"),
        ({"torch": "2.11.0+cu130", "cuda": "13.0"}, "torch 2.11.0+cu130 is built for CUDA 13.0, not for ROCm"),
    ],
)
def test_devices_without_a_rocm_torch_are_unusable(probe: Ask, build: dict[str, str], words: str) -> None:
    # requirement P6, P2
    found = probe("mi210", build=build)
    assert all(words in d.unusable for d in found.devices)
    assert any(words in e.text for e in found.evidence)


def test_the_runtime_falls_back_to_the_installed_rocm(machine: Any, tree: Any) -> None:
    root = tree("mi210")
    assert not RocmPlatform(machine(root, build={})).probe({}).devices[0].runtime.known
    (root / "opt/rocm/.info").mkdir(parents=True)
    (root / "opt/rocm/.info/version").write_text("6.4.1-83\n")
    assert RocmPlatform(machine(root, build={})).probe({}).devices[0].runtime.release == (6, 4, 1)


def test_an_override_changes_the_arch_and_keeps_the_hardwares(probe: Ask) -> None:
    found = probe("igpu_dgpu", {"HSA_OVERRIDE_GFX_VERSION_2": "10.3.0"})
    assert [d.arch.name for d in found.devices] == ["gfx1100", "gfx1030"]
    assert dict(found.devices[1].properties)["hardware_arch"] == "gfx1036"
    everywhere = probe("igpu_dgpu", {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"})
    assert [d.arch.name for d in everywhere.devices] == ["gfx1100", "gfx1100"]


def test_an_override_that_the_runtime_cannot_read_makes_devices_unusable(probe: Ask) -> None:
    device = probe("rx7900xtx", {"HSA_OVERRIDE_GFX_VERSION": "gfx1100"}).devices[0]
    assert "HSA_OVERRIDE_GFX_VERSION='gfx1100' is no version" in device.unusable


def test_names_come_from_libdrms_list(machine: Any, tree: Any) -> None:
    root = tree("rx7900xtx")
    listed = root / "usr/share/libdrm/amdgpu.ids"
    listed.parent.mkdir(parents=True)
    listed.write_text(
        "# List of AMDGPU IDs\n1.0.0\n744C,\tC8,\tAMD Radeon RX 7900 XTX\n744C,\tCC,\tAMD Radeon RX 7900 XT\n"
    )
    found = RocmPlatform(machine(root)).probe({})
    assert found.devices[0].name == "AMD Radeon RX 7900 XTX"
    assert all(e.source != "amdsmi" for e in found.evidence)


def _amdsmi(names: dict[str, str]) -> SimpleNamespace:
    return SimpleNamespace(
        AmdSmiException=type("AmdSmiException", (Exception,), {}),
        amdsmi_get_processor_handles=lambda: list(names),
        amdsmi_get_gpu_device_bdf=lambda handle: handle.upper(),
        amdsmi_get_gpu_asic_info=lambda handle: {"market_name": names[handle]},
    )


def test_names_come_from_amdsmi_by_pci_address(probe: Ask) -> None:
    # requirement P14
    smi = _amdsmi({"0000:10:00.0": "AMD Radeon Graphics", "0000:03:00.0": "AMD Radeon RX 7900 XTX"})
    found = probe("igpu_dgpu", amdsmi=smi)
    assert [d.name for d in found.devices] == ["AMD Radeon RX 7900 XTX", "AMD Radeon Graphics"]


def test_a_missing_name_is_told_with_the_remedy(probe: Ask) -> None:
    assert any(e.source == "amdsmi" and e.remedy for e in probe("rx7900xtx").evidence)
    assert probe("mi355x").evidence[1:] == ()


def test_an_initialised_torch_answers_where_there_is_no_kfd(machine: Any, hip_torch: Any, tmp_path: Path) -> None:
    found = RocmPlatform(machine(tmp_path, torch=hip_torch())).probe({})
    assert [d.arch.name for d in found.devices] == ["gfx1100"]
    assert found.devices[0].multiprocessors == 96


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"initialised": False}, "not initialised to ask"),
        ({"home": "torch_musa.core.device"}, "torch.cuda is patched"),
    ],
)
def test_torch_is_not_asked_when_that_would_start_it_or_mislead(
    machine: Any, hip_torch: Any, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    # requirement P16, X14
    found = RocmPlatform(machine(tmp_path, torch=hip_torch(**how))).probe({})
    assert found.devices == ()
    assert words in found.evidence[1].text


def test_amdsmi_is_not_imported_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "amdsmi"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise KeyError('libamd_smi.so')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(Exception, match=r"libamd_smi\.so is not"):
        System(tmp_path).amdsmi({})


@pytest.mark.parametrize(
    ("arch", "name", "expected", "units"),
    [
        ("gfx942", "", "AMD Instinct MI300X", 304),
        ("gfx942", "MI325X", "MI325X", 304),
        ("gfx1100", "", "AMD Radeon RX 7900 XTX", 96),
        ("gfx1310", "", "", None),
    ],
)
def test_simulated_devices_get_what_the_product_has(arch: str, name: str, expected: str, units: int | None) -> None:
    platform = RocmPlatform()
    given = Device(platform="rocm", arch=platform.parse_arch(arch), name=name, simulated=True)
    done = platform.simulate(given)
    assert (done.name, done.multiprocessors, done.torch_type) == (expected, units, "cuda")
    assert done.capabilities == platform.capabilities(given.arch)


def test_simulation_keeps_what_is_given() -> None:
    platform = RocmPlatform()
    given = Device(
        platform="rocm", arch=Arch("rocm", "gfx942"), memory=1, multiprocessors=2, capabilities=frozenset({"x"})
    )
    done = platform.simulate(given)
    assert (done.memory, done.multiprocessors, done.capabilities) == (1, 2, frozenset({"x"}))


def test_libraries_are_named_with_their_distributions() -> None:
    libraries = {library.name: library for library in RocmPlatform().libraries()}
    assert libraries["amd-aiter"].module == "aiter"
    assert all(library.install for library in libraries.values())
