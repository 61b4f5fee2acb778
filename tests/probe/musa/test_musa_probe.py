"""Moore Threads devices: sources, facts, visibility, and what is told where there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal._device import Device, Probe
from hal._version import Version
from hal.errors import VisibilityError
from hal_musa import MusaPlatform
from hal_musa._system import System
from hal_musa._torch import decode_version

Ask = Callable[..., Probe]
GIB = 1 << 30
VARIABLE = "MUSA_VISIBLE_DEVICES"


def test_four_s5000(probe: Ask, records: Any) -> None:
    # requirement C9
    found = probe(records.S5000S)
    first = found.devices[0]
    assert [d.arch.name for d in found.devices] == ["mp_31"] * 4
    assert (first.id, first.name, first.memory, first.multiprocessors) == ("musa:0", "MTT S5000", 80 * GIB, 56)
    assert (first.uuid, first.pci) == ("7de4d75b-7522-1fdc-8dc4-db9a169a5e88", "00000000:2a:00.0")
    assert (first.torch_type, first.unusable, first.driver.release) == ("musa", "", (3, 3, 1))
    assert "fp8_e4m3fn" in first.capabilities
    assert first.arch >= MusaPlatform().parse_arch("mp_31")


@pytest.mark.parametrize(
    ("gpu", "arch", "has", "lacks"), [("S4000", "mp_22", "bf16", "fp8_e4m3fn"), ("S80", "mp_21", "fp16", "bf16")]
)
def test_other_products(probe: Ask, records: Any, gpu: str, arch: str, has: str, lacks: str) -> None:
    # requirement C9
    (device,) = probe((getattr(records, gpu),)).devices
    assert device.arch.name == arch
    assert has in device.capabilities
    assert lacks not in device.capabilities


def test_mtml_is_started_once_and_never_stopped(records: Any, tmp_path: Path) -> None:
    mtml = records.Mtml(records.S5000S)
    platform = MusaPlatform(records.Machine(tmp_path, mtml=mtml))
    platform.probe({})
    platform.probe({})
    assert mtml._mtmlLib_refcount == 1
    assert mtml.open_memory == 0


def test_a_started_mtml_is_shared(records: Any, tmp_path: Path) -> None:
    mtml = records.Mtml(records.S5000S)
    mtml.mtmlLibraryInit()
    MusaPlatform(records.Machine(tmp_path, mtml=mtml)).probe({})
    assert mtml._mtmlLib_refcount == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "MTML's library cannot be loaded: Failed to load MTML library on Linux"),
        ("broken", "MTML does not start: No Permission"),
    ],
)
def test_an_mtml_that_does_not_start_is_evidence(probe: Ask, records: Any, kind: str, words: str) -> None:
    # requirement P6, P9
    missing = OSError("Failed to load MTML library on Linux. Tried: libmtml.so.2, libmtml.so\nLoad errors: ...")
    fails = missing if kind == "missing" else records.Mtml.MTMLError("No Permission")
    found = probe(None, mtml=records.Mtml((), fails=fails))
    assert found.devices == ()
    assert found.evidence[0].text.startswith(words)
    assert found.evidence[0].remedy


def test_no_bindings_and_no_gpus_are_evidence(probe: Ask) -> None:
    # requirement P9, P17
    assert [e.source for e in probe(None).evidence] == ["MTML", "torch_musa"]
    assert probe(()).evidence[0].text == "MTML starts, but lists no GPU"


def test_what_mtml_does_not_tell_is_none_and_is_said(probe: Ask, records: Any) -> None:
    gpu = records.replace(records.S4000, silent=frozenset({"mtmlMemoryGetTotal", "mtmlDeviceGetUUID"}))
    found = probe((gpu,))
    assert (found.devices[0].memory, found.devices[0].uuid) == (None, "")
    assert "does not tell mtmlMemoryGetTotal: Not Supported" in found.evidence[0].text


def test_an_unknown_product_is_never_another_ones_arch(probe: Ask, records: Any) -> None:
    # requirement X16, P14
    (device,) = probe((records.Gpu("MTT X900", 96 * GIB, "u", "0"),)).devices
    assert (device.arch.name, device.capabilities) == ("unknown", frozenset())
    assert "'MTT X900', whose arch is not known" in device.unusable


def test_torch_musa_knows_the_arch_of_an_unknown_product(probe: Ask, records: Any, musa_torch: Any) -> None:
    gpu = records.Gpu("MTT X900", 96 * GIB, "9a9a", "00000000:05:00.0")
    (device,) = probe((gpu,), torch=musa_torch("MTT X900")).devices
    assert (device.arch.name, device.uuid, device.unusable) == ("mp_41", "9a9a", "")


def test_an_initialised_torch_musa_answers_alone(probe: Ask, musa_torch: Any) -> None:
    # requirement C9
    found = probe(None, torch=musa_torch("MTT S5000", "MTT S5000"))
    assert [(d.arch.name, d.multiprocessors) for d in found.devices] == [("mp_31", 56)] * 2
    assert found.devices[0].runtime == Version.parse("4.3")


def test_torch_musa_is_not_started_to_ask(probe: Ask, musa_torch: Any) -> None:
    # requirement P16
    found = probe(None, torch=musa_torch("MTT S5000", initialised=False))
    assert found.devices == ()
    assert "not initialised to ask" in found.evidence[1].text


def test_torch_cuda_is_never_asked_even_where_torchada_has_patched_it(
    probe: Ask, records: Any, musa_torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement C9, X14
    plain = probe(records.S5000S)
    monkeypatch.setitem(sys.modules, "torchada", SimpleNamespace())
    torch = musa_torch("MTT S5000", initialised=False, version="4030")
    with_torchada = probe(records.S5000S, torch=torch)
    assert [d.uuid for d in with_torchada.devices] == [d.uuid for d in plain.devices]
    assert [d.torch_type for d in with_torchada.devices] == ["musa"] * 4


SHOWN = [
    ({}, [0, 1, 2, 3]),
    ({VARIABLE: "2,0"}, [2, 0]),
    ({VARIABLE: " 1 , 3 "}, [1, 3]),
    ({VARIABLE: ""}, []),
    ({VARIABLE: "-1"}, []),
    ({VARIABLE: "0,4,1"}, [0]),
    ({VARIABLE: "0,0"}, []),
    ({VARIABLE: "7de4d75b-7522-1fdc-8dc4-db9a169a5e88"}, [0]),
    ({VARIABLE: "4d1254b9,7de4"}, [3, 0]),
    ({VARIABLE: "GPU-4d1254b9"}, [3]),
    ({VARIABLE: "zero"}, []),
    ({"CUDA_VISIBLE_DEVICES": "3"}, [0, 1, 2, 3]),
    ({"CUDA_VISIBLE_DEVICES": "", VARIABLE: "1"}, [1]),
]


@pytest.mark.parametrize(("environ", "shown"), SHOWN, ids=[str(row[0]) for row in SHOWN])
def test_musa_visible_devices_alone_governs(
    probe: Ask, records: Any, environ: dict[str, str], shown: list[int]
) -> None:
    # requirement P19, P49
    found = probe(records.S5000S, environ)
    assert [d.uuid for d in found.devices] == [records.S5000S[i].uuid for i in shown]
    assert [d.index for d in found.devices] == list(range(len(shown)))
    assert any(e.source == VARIABLE for e in found.evidence) == (VARIABLE in environ)


def test_an_ambiguous_uuid_is_an_error_that_names_the_matches(probe: Ask, records: Any) -> None:
    # requirement P13
    with pytest.raises(VisibilityError, match=r"fits 2 GPUs: a7257b94-d3d7.*, a7257b94-eb86"):
        probe(records.S5000S, {VARIABLE: "a7257b94"})


def test_different_cards_whose_order_is_not_known_stay_unknown(probe: Ask, records: Any) -> None:
    # requirement P14
    found = probe((records.S80, records.S4000))
    assert [d.arch.name for d in found.devices] == ["unknown", "unknown"]
    assert all("MTT S80 or MTT S4000" in d.unusable for d in found.devices)
    by_uuid = probe((records.S80, records.S4000), {VARIABLE: f"{records.S4000.uuid},{records.S80.uuid}"})
    assert [d.arch.name for d in by_uuid.devices] == ["mp_22", "mp_21"]


def test_different_cards_get_musas_order_from_torch_musa(probe: Ask, records: Any, musa_torch: Any) -> None:
    # requirement P14
    found = probe((records.S80, records.S4000), torch=musa_torch("MTT S4000", "MTT S80"))
    assert [(d.arch.name, d.uuid) for d in found.devices] == [("mp_22", ""), ("mp_21", "")]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"build": {}, "torch_musa": ""}, "torch is not installed: install torch_musa"),
        ({"build": {"torch": "2.13.0+cpu"}, "torch_musa": ""}, "torch_musa is not installed beside torch 2.13.0+cpu:"),
        (
            {"build": {"torch": "2.11.0+cu130", "cuda": "13.0"}, "torch_musa": ""},
            "torch_musa is not installed beside torch 2.11.0+cu130, which is built for CUDA 13.0:",
        ),
    ],
)
def test_devices_without_torch_musa_are_unusable(probe: Ask, records: Any, facts: dict[str, Any], words: str) -> None:
    # requirement P6, P2
    found = probe(records.S5000S, **facts)
    assert all(d.unusable.startswith(words) for d in found.devices)
    assert any(e.source == "torch build" for e in found.evidence)


@pytest.mark.parametrize(
    ("text", "release"),
    [("4030", (4, 3, 0)), ("5020", (5, 2, 0)), ("4000", (4, 0, 0)), ("40306", (4, 3, 6)), ("4.3.6", (4, 3, 6))],
)
def test_torch_version_musa_is_one_number(text: str, release: tuple[int, ...]) -> None:
    # requirement C9, E2
    assert Version.parse(decode_version(text)).release == release


def test_the_runtime_comes_from_torch_musas_version_or_the_toolkit(records: Any, tmp_path: Path) -> None:
    # requirement E2
    mtml = records.Mtml(records.S5000S)

    def runtime(**facts: Any) -> Version:
        return MusaPlatform(records.Machine(tmp_path, mtml=mtml, **facts)).probe({}).devices[0].runtime

    assert not runtime().known
    assert runtime(torch_musa="2.11.0.post2+musa5.2.0").release == (5, 2, 0)
    assert runtime(build={"torch": "2.7.1", "musa": "4.3.6"}).release == (4, 3, 6)
    (tmp_path / "usr/local/musa").mkdir(parents=True)
    (tmp_path / "usr/local/musa/version.json").write_text('{"musa_toolkits": {"version": "5.1.0", "branch": "x"}}')
    assert runtime().release == (5, 1, 0)
    (tmp_path / "usr/local/musa/version.json").write_text("[]")
    assert not runtime().known


def test_missing_bindings_are_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymtml", None)
    with pytest.raises(Exception, match="pymtml cannot be imported"):
        System().mtml()


def test_the_real_bindings_have_every_call(records: Any) -> None:
    pymtml = pytest.importorskip("pymtml")
    calls = [name for name in vars(records.Mtml) if name.startswith("mtml")]
    assert [name for name in calls if not hasattr(pymtml, name)] == []
    assert hasattr(pymtml, "_mtmlLib_refcount")


@pytest.mark.parametrize(
    ("arch", "name", "expected", "units", "gib"),
    [
        ("mp_31", "", "MTT S5000", 56, 80),
        ("mp_22", "", "MTT S4000", None, 48),
        ("mp_21", "MTT S3000", "MTT S3000", None, 32),
        ("mp_31", "MTT S4000", "MTT S4000", None, None),
        ("mp_45", "", "", None, None),
    ],
)
def test_simulated_devices_get_what_the_product_has(
    arch: str, name: str, expected: str, units: int | None, gib: int | None
) -> None:
    platform = MusaPlatform()
    done = platform.simulate(Device(platform="musa", arch=platform.parse_arch(arch), name=name, simulated=True))
    assert (done.name, done.multiprocessors, done.torch_type) == (expected, units, "musa")
    assert done.memory == (None if gib is None else gib * GIB)
    assert done.capabilities == platform.capabilities(done.arch)


def test_libraries_are_named_with_the_module_that_proves_them() -> None:
    libraries = {library.name: library for library in MusaPlatform().libraries()}
    assert libraries["mate"].module == "mate.mha_interface"
    assert all(library.install for library in libraries.values())
