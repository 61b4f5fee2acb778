"""Archs of every vendor: parsing, order inside a line, and none between vendors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hal
from hal._arch import Arch
from hal._cpu_probe import cpu_capabilities, parse_cpu_arch
from hal._platform import Platform
from hal_musa import MusaPlatform
from hal_nvidia import NvidiaPlatform
from hal_rocm import RocmPlatform

PLATFORMS: dict[str, Platform] = {p.name: p for p in (NvidiaPlatform(), RocmPlatform(), MusaPlatform())}

SPELLINGS = [
    *[("nvidia", text, "sm_90", (9, 0)) for text in ("sm_90", "sm90", "SM_90", "sm 90", "sm-9.0", "90", "9.0", "9,0")],
    *[
        ("nvidia", text, "sm_90", (9, 0))
        for text in ("sm_90a", "compute_90", "90a", "9.0a", "(9, 0)", "(9,0)", " 9.0 ")
    ],
    ("nvidia", "sm_75", "sm_75", (7, 5)),
    ("nvidia", "sm_100", "sm_100", (10, 0)),
    ("nvidia", "sm_100f", "sm_100", (10, 0)),
    ("nvidia", "10.3", "sm_103", (10, 3)),
    ("nvidia", "sm_120", "sm_120", (12, 0)),
    ("nvidia", "(12, 1)", "sm_121", (12, 1)),
    ("nvidia", "sm_999", "sm_999", (99, 9)),
    ("rocm", "gfx906", "gfx906", (9, 0, 6)),
    ("rocm", "gfx908", "gfx908", (9, 0, 8)),
    ("rocm", "gfx90a", "gfx90a", (9, 0, 10)),
    ("rocm", "gfx942", "gfx942", (9, 4, 2)),
    ("rocm", "gfx942:sramecc+:xnack-", "gfx942", (9, 4, 2)),
    ("rocm", "amdgcn-amd-amdhsa--gfx942:sramecc+:xnack-", "gfx942", (9, 4, 2)),
    ("rocm", "GFX950", "gfx950", (9, 5, 0)),
    ("rocm", "gfx1100", "gfx1100", (11, 0, 0)),
    ("rocm", "gfx1151", "gfx1151", (11, 5, 1)),
    ("rocm", "gfx1201", "gfx1201", (12, 0, 1)),
    ("rocm", "gfx1250", "gfx1250", (12, 5, 0)),
    ("rocm", "gfx1310", "gfx1310", (13, 1, 0)),
    *[("musa", text, "mp_31", (3, 1)) for text in ("mp_31", "mp31", "MP 3.1", "31", "3.1", "(3, 1)", "3, 1")],
    ("musa", "mp_21", "mp_21", (2, 1)),
    ("musa", "22", "mp_22", (2, 2)),
    ("musa", "mp_32", "mp_32", (3, 2)),
]

MALFORMED = [
    *[
        ("nvidia", text)
        for text in ("", "sm", "sm_9", "sm_09", "sm_90x", "sm_9000", "9.10", "gfx942", "mp_31", "hopper")
    ],
    *[("nvidia", text) for text in ("(9, 0", "9.0.0", "-9.0", "sm_90aa", "٩٠")],
    *[
        ("rocm", text)
        for text in ("", "gfx", "gfx9", "gfx94", "942", "9.4", "(9, 4)", "gfx90g", "gfx942:xnack", "sm_90")
    ],
    *[("rocm", text) for text in ("gfx11-generic", "gfx942 gfx950", "gfx12345")],
    *[("musa", text) for text in ("", "mp", "mp_3", "mp_310", "310", "sm_31", "3.1.0", "gfx31")],
]


@pytest.mark.parametrize(("platform", "text", "name", "number"), SPELLINGS, ids=[f"{p}:{t}" for p, t, *_ in SPELLINGS])
def test_every_spelling_names_one_arch(platform: str, text: str, name: str, number: tuple[int, ...]) -> None:
    # requirement P18, R15, X16
    arch = PLATFORMS[platform].parse_arch(text)
    assert (arch.platform, arch.name, arch.number) == (platform, name, number)
    assert PLATFORMS[platform].parse_arch(arch.name) == arch


@pytest.mark.parametrize(("platform", "text"), MALFORMED, ids=[f"{p}:{t!r}" for p, t in MALFORMED])
def test_malformed_texts_are_errors_that_show_a_right_form(platform: str, text: str) -> None:
    # requirement P18
    right = {"nvidia": "sm_90", "rocm": "gfx942", "musa": "mp_31"}[platform]
    with pytest.raises(ValueError, match=right):
        PLATFORMS[platform].parse_arch(text)


def test_a_tuple_is_a_spelling_too() -> None:
    assert PLATFORMS["nvidia"].parse_arch((9, 0)).name == "sm_90"  # type: ignore[arg-type]
    assert PLATFORMS["musa"].parse_arch((3, 1)).name == "mp_31"  # type: ignore[arg-type]


def test_features_are_kept_and_do_not_change_the_identity() -> None:
    plain, full = (PLATFORMS["rocm"].parse_arch(t) for t in ("gfx942", "gfx942:sramecc+:xnack-"))
    assert full.features == ("sramecc+", "xnack-")
    assert plain == full
    assert hash(plain) == hash(full)
    assert PLATFORMS["nvidia"].parse_arch("sm_90a").features == ("a",)


def test_gfx908_and_gfx90a_are_two_archs() -> None:
    # requirement R15
    old, new = PLATFORMS["rocm"].parse_arch("gfx908"), PLATFORMS["rocm"].parse_arch("gfx90a")
    assert old != new
    assert old < new


@pytest.mark.parametrize(
    ("platform", "ascending"),
    [
        ("nvidia", ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")),
        ("rocm", ("gfx908", "gfx90a", "gfx942", "gfx950")),
        ("rocm", ("gfx1030", "gfx1100", "gfx1151", "gfx1200", "gfx1201")),
        ("musa", ("mp_21", "mp_22", "mp_31", "mp_32")),
    ],
)
def test_generations_of_one_line_are_ordered(platform: str, ascending: tuple[str, ...]) -> None:
    archs = [PLATFORMS[platform].parse_arch(name) for name in ascending]
    assert all(older < newer and newer >= older for older, newer in itertools.pairwise(archs))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gfx942", "gfx1100"),
        ("gfx950", "gfx1250"),
        ("gfx1201", "gfx1250"),
        ("gfx906", "gfx90a"),
        ("gfx936", "gfx942"),
        ("gfx1310", "gfx1201"),
        ("gfx936", "gfx936"),
    ],
)
def test_lines_of_one_vendor_have_no_common_scale(one: str, other: str) -> None:
    # requirement X16
    left, right = PLATFORMS["rocm"].parse_arch(one), PLATFORMS["rocm"].parse_arch(other)
    assert not left.comparable(right)
    with pytest.raises(TypeError, match="no common scale"):
        left < right  # noqa: B015


def _numbers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def _nvidia() -> st.SearchStrategy[Arch]:
    return st.builds(lambda a, b: PLATFORMS["nvidia"].parse_arch(f"sm_{a}{b}"), _numbers(1, 99), _numbers(0, 9))


def _musa() -> st.SearchStrategy[Arch]:
    return st.builds(lambda a, b: PLATFORMS["musa"].parse_arch(f"mp_{a}{b}"), _numbers(1, 9), _numbers(0, 9))


def _rocm() -> st.SearchStrategy[Arch]:
    def build(major: int, minor: int, stepping: int) -> Arch:
        return PLATFORMS["rocm"].parse_arch(f"gfx{major}{minor:x}{stepping:x}")

    return st.builds(build, _numbers(1, 20), _numbers(0, 15), _numbers(0, 15))


@pytest.mark.parametrize("platform", sorted(PLATFORMS))
@given(text=st.text(max_size=30))
def test_parsing_raises_nothing_but_value_error(platform: str, text: str) -> None:
    with contextlib.suppress(ValueError):
        arch = PLATFORMS[platform].parse_arch(text)
        assert PLATFORMS[platform].parse_arch(arch.name) == arch


@pytest.mark.parametrize("make", [_nvidia, _musa, _rocm], ids=["nvidia", "musa", "rocm"])
@given(data=st.data())
def test_the_order_inside_a_line_is_total(make: Callable[[], st.SearchStrategy[Arch]], data: st.DataObject) -> None:
    one, other, third = (data.draw(make()) for _ in range(3))
    if not one.comparable(other):
        with pytest.raises(TypeError):
            one <= other  # noqa: B015
        return
    assert [one < other, one == other, one > other].count(True) == 1
    assert (one <= other) == (one < other or one == other)
    if other.comparable(third) and one <= other <= third:
        assert one <= third


@given(one=st.one_of(_nvidia(), _rocm(), _musa()), other=st.one_of(_nvidia(), _rocm(), _musa()))
def test_vendors_are_never_compared(one: Arch, other: Arch) -> None:
    # requirement P18
    if one.platform == other.platform:
        return
    assert one != other
    for compare in (lambda: one < other, lambda: one <= other, lambda: one > other, lambda: one >= other):
        with pytest.raises(TypeError):
            compare()


def test_a_gfx_number_is_never_compared_with_a_compute_capability() -> None:
    # requirement P18
    with pytest.raises(TypeError, match="rocm:gfx942 and nvidia:sm_90"):
        PLATFORMS["rocm"].parse_arch("gfx942") >= PLATFORMS["nvidia"].parse_arch("sm_90")  # noqa: B015


CLAIMS = [
    ("nvidia", "sm_75", {"fp16"}, {"bf16", "fp8_e4m3fn", "triton"}),
    ("nvidia", "sm_80", {"bf16", "tf32", "triton", "triton_fp8_e5m2"}, {"fp8_e4m3fn", "triton_fp8_e4m3fn", "tma"}),
    ("nvidia", "sm_89", {"fp8_e4m3fn", "fp8_e5m2", "triton_fp8_e4m3fn"}, {"tma", "wgmma"}),
    ("nvidia", "sm_90", {"wgmma", "tma", "cluster", "fp8_e4m3fn"}, {"tcgen05", "fp4_e2m1"}),
    ("nvidia", "sm_100", {"tcgen05", "tma", "cluster", "fp4_e2m1"}, {"wgmma"}),
    ("nvidia", "sm_103", {"tcgen05"}, {"wgmma"}),
    ("nvidia", "sm_120", {"tma", "fp4_e2m1"}, {"tcgen05", "wgmma", "cluster"}),
    ("nvidia", "sm_121", {"tma", "fp4_e2m1"}, {"tcgen05", "wgmma", "cluster"}),
    ("nvidia", "sm_139", {"bf16", "fp8_e4m3fn", "tma"}, {"wgmma", "tcgen05", "cluster", "fp4_e2m1"}),
    ("nvidia", "sm_30", set(), {"fp16", "bf16"}),
    ("rocm", "gfx906", {"fp16"}, {"bf16", "mfma"}),
    ("rocm", "gfx90a", {"bf16", "mfma"}, {"fp8_e4m3fn", "fp8_e4m3fnuz"}),
    ("rocm", "gfx942", {"fp8_e4m3fnuz", "fp8_e5m2fnuz"}, {"fp8_e4m3fn", "fp8_e5m2"}),
    ("rocm", "gfx950", {"fp8_e4m3fn", "fp4_e2m1", "mxfp4"}, {"fp8_e4m3fnuz"}),
    ("rocm", "gfx1100", {"bf16", "wmma"}, {"fp8_e4m3fn", "fp8_e4m3fnuz", "mfma"}),
    ("rocm", "gfx1201", {"fp8_e4m3fn", "wmma"}, {"fp8_e4m3fnuz"}),
    ("rocm", "gfx1151", {"bf16", "wmma", "triton"}, {"fp8_e4m3fn", "fp8_e4m3fnuz", "mfma"}),
    ("rocm", "gfx1250", {"fp8_e4m3fn", "mxfp4", "wmma"}, {"fp8_e4m3fnuz", "mfma"}),
    ("rocm", "gfx936", set(), {"fp16", "bf16", "triton"}),
    ("rocm", "gfx1999", {"triton"}, {"fp16", "bf16", "mfma", "wmma", "wave32", "wave64"}),
    ("musa", "mp_21", {"fp16"}, {"bf16", "graph_capture"}),
    ("musa", "mp_22", {"bf16", "tf32", "graph_capture"}, {"fp8_e4m3fn", "triton"}),
    ("musa", "mp_31", {"bf16", "fp8_e4m3fn", "fp8_e5m2", "triton"}, {"fp8_e4m3fnuz"}),
    ("musa", "mp_45", set(), {"fp16"}),
]


@pytest.mark.parametrize(("platform", "name", "has", "lacks"), CLAIMS, ids=[f"{p}:{n}" for p, n, *_ in CLAIMS])
def test_capabilities(platform: str, name: str, has: set[str], lacks: set[str]) -> None:
    # requirement P29, P31, X16, D10
    found = PLATFORMS[platform].capabilities(PLATFORMS[platform].parse_arch(name))
    assert has <= found
    assert not lacks & found


@pytest.mark.parametrize(
    ("name", "wave", "lds", "matrix", "fp8"),
    [
        ("gfx90a", 64, 64, "cdna2", "none"),
        ("gfx942", 64, 64, "cdna3", "e4m3fnuz"),
        ("gfx950", 64, 160, "cdna4", "e4m3fn"),
        ("gfx1100", 32, 64, "rdna3", "none"),
        ("gfx1151", 32, 64, "rdna3_5", "none"),
        ("gfx1201", 32, 64, "rdna4", "e4m3fn"),
        ("gfx1250", 32, 320, "gfx125", "e4m3fn"),
    ],
)
def test_waves_local_memory_and_matrix_cores_of_amd(name: str, wave: int, lds: int, matrix: str, fp8: str) -> None:
    # requirement P18, P29
    with hal.simulate(f"rocm:{name}"):
        device = hal.device()
    found = dict(device.properties)
    assert found["wave_size"] == wave
    assert found["lds_bytes"] == lds << 10
    assert (found["matrix_cores"], found["fp8_flavour"]) == (matrix, fp8)
    assert {f"wave{wave}", f"lds_{lds}k"} <= device.capabilities


@pytest.mark.parametrize("platform", sorted(PLATFORMS))
def test_another_vendors_arch_has_no_capabilities(platform: str) -> None:
    others = {"nvidia": "sm_90", "rocm": "gfx942", "musa": "mp_31"}
    for other in others.keys() - {platform}:
        assert PLATFORMS[platform].capabilities(PLATFORMS[other].parse_arch(others[other])) == frozenset()


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("x86_64", "x86_64", ()),
        ("AMD64", "x86_64", ()),
        ("x86_64_v3", "x86_64", ("v3",)),
        ("x86-64-v4", "x86_64", ("v4",)),
        ("arm64", "aarch64", ()),
        ("aarch64", "aarch64", ()),
        ("riscv64", "riscv64", ()),
        ("i686", "x86", ()),
    ],
)
def test_cpu_spellings(text: str, name: str, features: tuple[str, ...]) -> None:
    arch = parse_cpu_arch(text)
    assert (arch.platform, arch.name, arch.features) == ("cpu", name, features)


@pytest.mark.parametrize("text", ["", "64", "aarch64_v3", "x86 64", "x86_64_v9!"])
def test_malformed_cpu_archs(text: str) -> None:
    with pytest.raises(ValueError, match=r"x86_64"):
        parse_cpu_arch(text)


def test_cpu_archs_promise_only_what_every_such_cpu_has() -> None:
    assert {"bf16", "fp16", "fp8_e4m3fn", "fp8_e4m3fnuz", "deterministic"} <= cpu_capabilities(parse_cpu_arch("x86_64"))
    assert "avx2" not in cpu_capabilities(parse_cpu_arch("x86_64"))
    assert {"avx2", "avx512f"} <= cpu_capabilities(parse_cpu_arch("x86_64_v4"))
    assert "neon" in cpu_capabilities(parse_cpu_arch("aarch64"))
    assert cpu_capabilities(Arch("nvidia", "sm_90")) == frozenset()
