"""``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``: which devices, in which order, and when that is not known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hal._device import Probe
from hal.errors import VisibilityError
from hal_nvidia import NvidiaPlatform
from hal_nvidia._visible import parse_visible

Ask = Callable[..., Probe]
VARIABLE = "CUDA_VISIBLE_DEVICES"

PARSED = [
    # value, (kind, ordinal or uuid or (uuid, instance)) of each id
    (None, []),
    ("", []),
    ("  ", []),
    ("-1", []),
    ("0", [("ordinal", 0)]),
    ("2,0", [("ordinal", 2), ("ordinal", 0)]),
    (" 1 , 3 ", [("ordinal", 1), ("ordinal", 3)]),
    ("+1", [("ordinal", 1)]),
    ("0,2,-1,1", [("ordinal", 0), ("ordinal", 2)]),
    ("0,0", []),
    ("0,1,0", []),
    ("1gpu2,2ampere", [("ordinal", 1), ("ordinal", 2)]),
    ("zero", []),
    ("0,,1", [("ordinal", 0)]),
    ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", [("gpu", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")]),
    ("GPU-8932f937", [("gpu", "GPU-8932f937")]),
    ("GPU-89,GPU-1d", [("gpu", "GPU-89"), ("gpu", "GPU-1d")]),
    ("GPU-89,GPU-89", []),
    ("GPU-89,0", [("gpu", "GPU-89")]),
    ("0,GPU-89", [("ordinal", 0)]),
    ("GPU-xyz", []),
    ("GPU-", []),
    ("gpu-8932f937", []),
    ("GPU-8932F937", [("gpu", "GPU-8932F937")]),
    (" GPU-8932f937", []),
    ("GPU-8932f937 ", [("gpu", "GPU-8932f937")]),
    ("8932f937-d72c-4106-c12f-20bd9faed9f6", [("ordinal", 8932)]),
    ("0x0", [("ordinal", 0)]),
    ("0.5", [("ordinal", 0)]),
    (",0", []),
    ("\u0660", []),
    ("MIG-11111111-aaaa-5c7f-9a1e-000000000001", [("mig", "MIG-11111111-aaaa-5c7f-9a1e-000000000001")]),
    ("MIG-GPU-a1000000-0000-4106-c12f-20bd9faed9f6/7/0", [("mig-path", "GPU-a1000000-0000-4106-c12f-20bd9faed9f6")]),
    ("MIG-GPU-a1000000/7", []),
    ("NoDevFiles", []),
]


@pytest.mark.parametrize(("value", "ids"), PARSED, ids=[repr(value) for value, _ in PARSED])
def test_values_become_typed_ids(value: str | None, ids: list[tuple[str, Any]]) -> None:
    # requirement P12
    visible = parse_visible(value)
    assert [(one.kind, one.uuid if one.ordinal is None else one.ordinal) for one in visible.ids] == ids
    assert visible.everything == (value is None)


@pytest.mark.parametrize("value", ["", "-1", "0,0", "0,9x,zero", "GPU-89,0", "GPU-xyz", " GPU-89"])
def test_a_list_that_is_cut_short_says_where(value: str) -> None:
    assert parse_visible(value).note


def test_the_older_form_of_mig_names_has_both_instances() -> None:
    # requirement P12
    (only,) = parse_visible("MIG-GPU-a1000000-0000-4106-c12f-20bd9faed9f6/7/1").ids
    assert only.instance == (7, 1)


SHOWN = [
    ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({VARIABLE: "3"}, [3]),
    ({VARIABLE: "7,0"}, [7, 0]),
    ({VARIABLE: ""}, []),
    ({VARIABLE: "-1"}, []),
    ({VARIABLE: "0,8,1"}, [0]),
    ({VARIABLE: "1,1"}, []),
    ({VARIABLE: "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, [0]),
    ({VARIABLE: "GPU-8932f937-1"}, [1]),
    ({VARIABLE: "GPU-d0,GPU-a0"}, [7, 4]),
    ({VARIABLE: "GPU-a0,GPU-a00"}, []),
    ({VARIABLE: "GPU-ffff"}, []),
    ({VARIABLE: "GPU-d0,GPU-ffff,GPU-a0"}, [7]),
    ({VARIABLE: "MIG-11111111"}, []),
    ({VARIABLE: "MIG-a0000000-0001-4106-c12f-20bd9faed9fa"}, [4]),
    ({VARIABLE: "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [2]),
    ({VARIABLE: "2", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, [2]),
]


@pytest.mark.parametrize(("environ", "shown"), SHOWN, ids=[str(row[0]) for row in SHOWN])
def test_visible_devices_of_eight_equal_cards(
    probe: Ask, records: Any, environ: dict[str, str], shown: list[int]
) -> None:
    # requirement P12, P13
    found = probe(records.H200S, environ)
    assert [d.uuid for d in found.devices] == [records.H200S[i].uuid for i in shown]
    assert [d.index for d in found.devices] == list(range(len(shown)))
    assert any(e.source == VARIABLE for e in found.evidence) == (VARIABLE in environ)


def test_equal_cards_need_no_driver_for_their_order(records: Any, tmp_path: Path) -> None:
    machine = records.Machine(tmp_path, nvml=records.Nvml(records.H200S))
    NvidiaPlatform(machine).probe({VARIABLE: "3,1"})
    assert machine.asked == []


def test_an_ambiguous_uuid_is_an_error_that_names_the_matches(probe: Ask, records: Any) -> None:
    # requirement P13
    with pytest.raises(VisibilityError) as caught:
        probe(records.H200S, {VARIABLE: "GPU-8932f937"})
    assert all(gpu.uuid in str(caught.value) for gpu in records.H200S[:2])
    assert caught.value.variables == {VARIABLE: "GPU-8932f937"}


@pytest.mark.parametrize("value", [None, "0,1"])
def test_different_cards_get_cudas_order_from_the_driver(probe: Ask, records: Any, value: str | None) -> None:
    # requirement P14, P15
    environ = {} if value is None else {VARIABLE: value}
    rows = [records.row(records.H100, 114), records.row(records.T4, 40)]
    found = probe((records.T4, records.H100), environ, driver=rows)
    assert [(d.index, d.name, d.arch.name) for d in found.devices] == [
        (0, "NVIDIA H100 PCIe", "sm_90"),
        (1, "Tesla T4", "sm_75"),
    ]
    assert dict(found.devices[0].properties)["source"] == "NVML"
    assert found.devices[0].capabilities != found.devices[1].capabilities


def test_pci_order_makes_nvmls_order_cudas(records: Any, tmp_path: Path) -> None:
    # requirement P14
    machine = records.Machine(tmp_path, nvml=records.Nvml((records.T4, records.H100)))
    found = NvidiaPlatform(machine).probe({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VARIABLE: "1,0"})
    assert [d.name for d in found.devices] == ["NVIDIA H100 PCIe", "Tesla T4"]
    assert machine.asked == []


def test_uuids_need_no_order(records: Any, tmp_path: Path) -> None:
    # requirement P14
    machine = records.Machine(tmp_path, nvml=records.Nvml((records.T4, records.H100)))
    found = NvidiaPlatform(machine).probe({VARIABLE: f"{records.H100.uuid},{records.T4.uuid}"})
    assert [d.name for d in found.devices] == ["NVIDIA H100 PCIe", "Tesla T4"]
    assert machine.asked == []


@pytest.mark.parametrize(("value", "count"), [(None, 2), ("1", 1), ("1,0", 2), ("0,5", 1)])
def test_an_order_that_cannot_be_learnt_leaves_devices_unknown(
    probe: Ask, records: Any, value: str | None, count: int
) -> None:
    # requirement P14
    found = probe((records.T4, records.H100), {} if value is None else {VARIABLE: value})
    assert len(found.devices) == count
    for device in found.devices:
        assert (device.arch.name, device.name, device.uuid, device.memory) == ("unknown", "", "", None)
        assert device.capabilities == frozenset()
        assert "Tesla T4 or NVIDIA H100 PCIe" in device.unusable
        assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in device.unusable
    assert any(e.source == "CUDA's order" and e.remedy for e in found.evidence)


MIG = [
    # environment, name of the one device, how many are left out
    ({}, "MIG 2g.20gb", 3),
    ({VARIABLE: "0"}, "MIG 2g.20gb", 2),
    ({VARIABLE: "GPU-a1000000"}, "MIG 2g.20gb", 2),
    ({VARIABLE: "MIG-22222222-b"}, "MIG 1g.10gb", 0),
    ({VARIABLE: "MIG-22222222-bbbb-5c7f-9a1e-000000000003,MIG-11111111"}, "MIG 1g.10gb", 1),
    ({VARIABLE: "MIG-GPU-a1000000-0000-4106-c12f-20bd9faed9f6/7/0"}, "MIG 1g.10gb", 0),
]


@pytest.mark.parametrize(("environ", "name", "left_out"), MIG, ids=[str(row[0]) for row in MIG])
def test_mig_instances(probe: Ask, records: Any, environ: dict[str, str], name: str, left_out: int) -> None:
    # requirement P12
    plain = records.replace(records.A100, uuid="GPU-a2000000-0000-4106-c12f-20bd9faed9f6")
    found = probe((records.MIG_A100, plain), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environ})
    (device,) = found.devices
    assert device.name.endswith(name)
    assert device.memory == int(name.split(".")[1][:-2]) << 30
    assert device.multiprocessors == int(name.split()[1][0]) * 14
    assert (device.arch.name, dict(device.properties)["mig_parent"]) == ("sm_80", records.MIG_A100.uuid)
    note = next(e.text for e in found.evidence if e.source == "MIG")
    assert (f"{left_out} left out" in note) == bool(left_out)


def test_a_whole_gpu_beside_a_mig_gpu_can_be_chosen(probe: Ask, records: Any) -> None:
    plain = records.replace(records.A100, uuid="GPU-a2000000-0000-4106-c12f-20bd9faed9f6")
    found = probe((records.MIG_A100, plain), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VARIABLE: "1"})
    assert [d.name for d in found.devices] == ["NVIDIA A100-SXM4-80GB"]


def test_an_ambiguous_mig_uuid_is_an_error(probe: Ask, records: Any) -> None:
    # requirement P13
    with pytest.raises(VisibilityError, match=r"fits 2 GPUs: MIG-22222222-a.*, MIG-22222222-b"):
        probe((records.MIG_A100,), {VARIABLE: "MIG-2222"})


def test_a_mig_gpu_without_instances_cannot_be_used(probe: Ask, records: Any) -> None:
    found = probe((records.replace(records.A100, mig=()),))
    assert found.devices == ()
    assert "no instance was made" in next(e.text for e in found.evidence if e.source == "MIG")
