"""What the host gives the Gluon kernels of Hopper: constants that they have, registers that there are, and their rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hal._plan import make_step
from hal_ops._gpu import Gpu
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_configs import (
    HOPPER_EXTEND,
    HOPPER_FP8,
    HOPPER_FP8_CACHE,
    HOPPER_PREFILL,
    HOPPER_ROWS,
    Hopper,
    config_of,
    hopper_of,
    padded_on,
)
from hal_ops.attention._triton_features import Features
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_prefill import prefill

CONFIGS = sorted({*HOPPER_PREFILL, HOPPER_FP8, *HOPPER_EXTEND, *HOPPER_ROWS, *HOPPER_FP8_CACHE}, key=str)


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU says that it is a Hopper; nothing is launched."""
    for phase in ("prefill", "extend"):
        where = Gpu("sm_90", 132, torch.device("cpu"))
        monkeypatch.setattr(f"hal_ops.attention.triton_{phase}.gpu_of", lambda _, where=where: where)


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "kv_layout": "NHD"}
    return AttentionRequest(**{**base, **fields})


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("phase", ["prefill", "extend"])
def test_the_kernel_has_all_constants(config: Hopper, phase: str) -> None:
    """The launch refuses constants that are not the last arguments."""
    request = request_of(head_dim=config.dim, v_head_dim=config.v_dim, page_size=config.block_n, dtype="bfloat16")
    config = dataclasses.replace(config, parts=2)
    if phase == "prefill":
        impl: Any = prefill(request, "cpu", configs=(config,))
        constants = impl.ways[0].launch.constants(((False, True, 16), True))
    else:
        impl = extend(request, "cpu", configs=(config,))
        constants = impl._ways(config.block_m)[0].launch.constants(((False, 0, 0, 0, 0), True))
    assert config.constants.items() <= constants.items()


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize("kernel", ["hopper", "for every arch"])
def test_programs_are_no_more_than_multiprocessors(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of Hopper is told how many tiles there are; the other has a program a tile."""
    request = request_of()
    configs = {"configs": (config_of("sm_90", request),)} if kernel != "hopper" else {}
    (way, *_) = prefill(request, "cpu", **configs).ways  # type: ignore[attr-defined, arg-type]
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(way, "launch", lambda *args: launched.append(args))
    for tiles in (7, 132, 1000):
        way.run(tiles, ("key",), ("box",), "q")
    way.run(1000, ("key",), ("box",), "q", loop=False)
    numbers = ((7, 7), (132, 132), (132, 1000), (1000, 1000))
    told = [(n, ("key", n < tiles), "box", tiles, "q") for n, tiles in numbers]
    assert launched == (told if kernel == "hopper" else [(n, ("key",), "q") for n in (7, 132, 1000, 1000)])


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize(
    ("fields", "keys", "tiles", "sections", "loop"),
    [
        ({}, 2048, 4096, False, True),
        ({}, 16384, 4096, False, False),
        ({"window": 1024}, 32768, 4096, True, True),
        ({"causal": False}, 2048, 384, True, True),
        ({"causal": False}, 8192, 4096, False, False),
        ({}, 4096, 384, True, False),
        ({}, 4096, 2048, True, True),
    ],
)
def test_long_and_uneven_tiles_are_handed_out_by_the_hardware(
    fields: dict[str, Any], keys: int, tiles: int, sections: bool, loop: bool
) -> None:
    impl: Any = prefill(request_of(**fields), "cpu")
    assert impl._loop(impl.ways[0], keys, tiles, sections) is loop


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize(
    ("fields", "rows", "loop"),
    [
        ({}, [(512, 512)] * 4, True),
        ({}, [(512, 8704)] * 8, False),
        ({}, [(16, 200), (256, 32768)], False),
        ({"window": 1024}, [(512, 8704)] * 8, True),
        ({"causal": False}, [(4096, 4096)], False),
        ({"kv_dtype": "float8_e4m3fn", "page_size": 64}, [(512, 8704)] * 8, True),
        ({}, [], True),
    ],
    ids=str,
)
def test_programs_of_several_tiles_are_for_short_ones(
    fields: dict[str, Any], rows: list[tuple[int, int]], loop: bool
) -> None:
    impl: Any = extend(request_of(dtype="bfloat16", **fields), "cpu")
    q_lens, kv_lens = ([pair[i] for pair in rows] for i in range(2))
    step = make_step(q_lens, kv_lens, torch.zeros(len(rows), 2048, dtype=torch.int32), 16, torch.device("cpu"))
    assert impl._loop(step, 32) is loop
    other = config_of("sm_90", impl.request)
    assert extend(impl.request, "cpu", configs=(other,))._loop(step, 32) is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_registers_are_not_more_than_there_are(config: Hopper) -> None:
    """Triton rounds a group's share down to a multiple of 8; ptxas takes at most 255 for a thread."""
    share = config.constants["REGISTERS"] // 8 * 8
    assert share <= 255
    assert config.registers % 8 == 0
    assert 128 * (config.parts * share + config.registers) <= 65536


def test_rows_of_the_table() -> None:
    request = request_of(phases=("prefill",))
    for name in ("sm_80", "sm_100", "gfx942"):
        assert hopper_of(name, request, cached=False) is None
    assert hopper_of("sm_90", request, cached=False) in HOPPER_PREFILL
    assert hopper_of("sm_90", request.replace(dtype="float32"), cached=False) is None
    assert hopper_of("sm_90", request.replace(head_dim=80), cached=False) is not None
    assert hopper_of("sm_90", request.replace(head_dim=72), cached=False) is None


def test_fp8_prefill_of_heads_of_128_has_a_row() -> None:
    request = request_of(phases=("prefill",), qkv_dtype="float8_e4m3fn")
    assert hopper_of("sm_90", request, cached=False) is HOPPER_FP8
    for other in ({"head_dim": 64}, {"v_head_dim": 64}, {"dtype": "float32"}, {"qkv_dtype": "float8_e4m3fnuz"}):
        assert hopper_of("sm_90", request.replace(**other), cached=False) is None


def test_fp8_caches_have_rows_for_heads_of_64_and_128() -> None:
    for dim, config in zip((64, 128), HOPPER_FP8_CACHE, strict=True):
        for name in ("float8_e4m3fn", "float8_e5m2"):
            assert hopper_of("sm_90", request_of(head_dim=dim, kv_dtype=name), cached=True) is config
    for other in ({"head_dim": 80}, {"v_head_dim": 64}, {"dtype": "float32"}, {"head_dim": 256}):
        request = request_of(kv_dtype="float8_e4m3fn").replace(**other)
        assert hopper_of("sm_90", request, cached=True) is None
    assert hopper_of("sm_90", request_of(kv_dtype="float8_e4m3fnuz"), cached=True) is None


def test_pages_that_are_copied_row_by_row_have_rows_of_their_own() -> None:
    found = {n: hopper_of("sm_90", request_of(page_size=n), cached=True) for n in (16, 64, 128, 192, 256)}
    assert found[128] == found[256] == HOPPER_EXTEND[1]
    assert found[16] == found[64] == found[192] == HOPPER_ROWS[0]


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize(("version", "turns"), [("3.6.0", True), ("3.7.1", False), ("3.9.0", False)])
def test_turns_are_for_the_triton_that_they_were_run_with(
    version: str, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    request = request_of(page_size=128)
    (way, *_) = prefill(request, "cpu").ways  # type: ignore[attr-defined]
    assert way.launch.constants(((False, True, 16), True))["TURNS"] is turns
    (config, *_) = extend(request, "cpu").configs  # type: ignore[attr-defined]
    assert config.turns is turns


def test_an_arch_that_nobody_has_named_gets_heads_of_one_part() -> None:
    request = request_of(head_dim=96)
    found = [
        a for a in ("sm_80", "sm_90", "gfx942", "gfx1201", "sm_75", "mp_31", "") if padded_on(a, request, cached=True)
    ]
    assert found == ["sm_75", "mp_31", ""]
    assert padded_on("sm_90", request.replace(kv_dtype="float8_e4m3fn"), cached=True)
    assert Features.of(request, padded=True).constants["CUT"] == 128
