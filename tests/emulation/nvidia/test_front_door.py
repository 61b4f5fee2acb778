"""What ``tests/gpu`` runs through the front door on hardware, here over emulated libraries: the tests are right, and so is
the path from a forced choice to the library's own call, with plans, cache writes and all."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from emulated import hardware, nvidia

import hal
from hal_nvidia._flashinfer_pool import _idle, _zeroed

FOLDER = Path(__file__).resolve().parents[2] / "gpu"
PAGED = ("fa2", "fa3", "fa4", "flashinfer_fa2", "flashinfer_fa3")
GENERATION = (
    *(("sm_90", name) for name in (*PAGED, "flashinfer_sink")),
    *(("sm_80", name) for name in ("fa2", "flashinfer_fa2")),
    *(("sm_120", name) for name in ("fa2", "flashinfer_fa2")),
    ("sm_100", "fa4"),
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hal_gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def paged() -> ModuleType:
    return load("test_paged_libraries")


@pytest.fixture(scope="module")
def generation() -> ModuleType:
    return load("test_generation")


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    yield
    _idle.clear()
    _zeroed.clear()


@pytest.fixture(params=PAGED)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A library as it is on Hopper, on the only device there is."""
    monkeypatch.setattr(hal, "device", lambda: hardware.device_of("sm_90"), raising=False)
    with nvidia.running_on("sm_90", request.param):
        yield request.param


@pytest.mark.parametrize("new", ["one", "some", "all"])
def test_short_and_odd_lengths(
    library: str, new: str, paged: ModuleType
) -> None:  # requirement D1, D2, D4, D5, D6, D15
    paged.test_short_and_odd_lengths(library, new)


@pytest.mark.parametrize("heads", [(6, 2), (5, 1), (21, 3), (12, 1)])
def test_groups_that_are_no_powers_of_two(library: str, heads: tuple[int, int], paged: ModuleType) -> None:
    # requirement D4, B13
    paged.test_groups_that_are_no_powers_of_two(library, heads)


def test_padded_bounds_change_nothing(library: str, paged: ModuleType) -> None:  # requirement D3, E3
    paged.test_padded_bounds_change_nothing(library)


@pytest.mark.parametrize("bounds", [(0, 100, 200), (0, 1, 16, 17, 64, 130, 199, 200)])
def test_a_prompt_in_chunks_equals_the_whole(library: str, bounds: tuple[int, ...], paged: ModuleType) -> None:
    # requirement D7, B9
    paged.test_a_prompt_in_chunks_equals_the_whole(library, bounds)


@pytest.mark.parametrize("window", [1, 16, 128])
def test_windows_count_the_query_itself(library: str, window: int, paged: ModuleType) -> None:  # requirement E8
    paged.test_windows_count_the_query_itself(library, window)


def test_the_same_input_gives_the_same_bits(library: str, paged: ModuleType) -> None:  # requirement D14
    paged.test_the_same_input_gives_the_same_bits(library)


def test_the_scale_of_an_fp8_v_is_applied(library: str, paged: ModuleType) -> None:  # requirement D12, B6, B7
    paged.test_the_scale_of_an_fp8_v_is_applied(library, 3.0)


@pytest.mark.parametrize(("arch", "name"), GENERATION)
def test_the_tokens_are_right(
    arch: str, name: str, generation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement A5, B1, C1, D10, P27, P34
    phases = next(p.values[1] for p in generation.libraries() if p.values[0] == name)
    with nvidia.running_on(arch, name):
        generation.run(
            name, [p for p in phases if offered(generation, name, p, arch)], hardware.device_of(arch), monkeypatch
        )


def offered(generation: ModuleType, name: str, phase: str, arch: str) -> bool:
    return generation._offered(name, phase, hardware.device_of(arch)) is not None
