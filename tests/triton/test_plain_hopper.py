"""What the host gives the Gluon kernels of Hopper: constants that they have, registers that there are, boxes of pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hal_ops._gpu import Gpu
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_boxes import boxes_of, page_boxes_of
from hal_ops.attention._triton_configs import (
    HOPPER_EXTEND,
    HOPPER_FP8,
    HOPPER_PREFILL,
    HOPPER_ROWS,
    Hopper,
    hopper_of,
    in_boxes,
)
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_prefill import prefill

CONFIGS = sorted({*HOPPER_PREFILL, HOPPER_FP8, *HOPPER_EXTEND, *HOPPER_ROWS}, key=str)


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
        constants = impl.ways[0].launch.constants(((False, True, 16),))
    else:
        impl = extend(request, "cpu", configs=(config,))
        constants = impl._ways(config.block_m)[0].launch.constants(((False, 0, 0, 0, 0),))
    assert config.constants.items() <= constants.items()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_registers_are_not_more_than_there_are(config: Hopper) -> None:
    """Triton rounds a group's share down to a multiple of 8; ptxas takes at most 255 for a thread."""
    share = config.constants["REGISTERS"] // 8 * 8
    assert share <= 255
    assert config.registers % 8 == 0
    assert 128 * (config.parts * share + config.registers) <= 65536


def test_which_caches_are_copied_in_boxes() -> None:
    paged = Hopper(128, 128, 128, 2, 40, paged=True)
    found = {n: in_boxes(paged, request_of(page_size=n)) for n in (16, 48, 64, 128, 192, 256)}
    assert found == {16: True, 48: False, 64: True, 128: True, 192: False, 256: True}
    rows = dataclasses.replace(paged, paged=False)
    assert [n for n in found if in_boxes(rows, request_of(page_size=n))] == [128, 256]
    assert not in_boxes(paged, request_of(head_dim=96)), "96 is 64 and 32 columns"
    assert in_boxes(paged, request_of(head_dim=192, v_head_dim=128))


@pytest.mark.parametrize("heads_first", [False, True])
def test_boxes_of_pages(heads_first: bool) -> None:
    x = torch.zeros(5, 2, 16, 128).transpose(1, 2) if heads_first else torch.zeros(5, 16, 2, 128)
    box, none, page_rows, head_rows, head_columns = page_boxes_of(x.bfloat16(), 128) or ()
    assert (box.block_shape, none.shape) == ([16, 64], x.shape)
    assert (page_rows, head_rows, head_columns) == ((32, 16, 0) if heads_first else (16, 0, 128))
    assert (boxes_of(x.bfloat16(), 128) or ())[0].block_shape == [128, 128]
    assert page_boxes_of(torch.zeros(5, 16, 2, 100).bfloat16(), 128) is None, "strides of 100 are not aligned"


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
    assert hopper_of("sm_90", request_of(kv_dtype="float8_e4m3fn"), cached=True) is None


def test_pages_that_are_copied_row_by_row_have_rows_of_their_own() -> None:
    found = {n: hopper_of("sm_90", request_of(page_size=n), cached=True) for n in (16, 48, 64, 128)}
    assert found[16] == found[64] == found[128] == HOPPER_EXTEND[1]
    assert found[48] == HOPPER_ROWS[0]
    assert hopper_of("sm_90", request_of(head_dim=96), cached=True) == HOPPER_ROWS[0]
