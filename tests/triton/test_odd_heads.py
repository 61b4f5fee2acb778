"""Heads that are no multiple of 16: Triton has compiled some wrongly on Hopper, and prefill and extend refuse all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_ops.attention.triton_decode import decode
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_limits import heads
from hal_ops.attention.triton_prefill import prefill

PHASES: dict[str, Callable[..., Any]] = {"prefill": prefill, "extend": extend, "decode": decode}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [4, 12, 20, 36, 40, 44, 60, 72, 100, 132, 136, 204, 250])
@pytest.mark.parametrize("phase", PHASES)
def test_odd_heads_are_right(phase: str, dim: int, assert_right: Callable[[Any], None]) -> None:  # requirement A5, D14
    for dtype, kv_layout in (("bfloat16", "NHD"), ("float16", "HND")):
        request = AttentionRequest(
            num_q_heads=6, num_kv_heads=2, head_dim=dim, dtype=dtype, page_size=16, kv_layout=kv_layout,
            return_lse=True, phases=(phase,),
        )  # fmt: skip
        if phase != "decode" and heads(request, cached=phase == "extend"):
            with pytest.raises(ValueError, match=f"head_dim {dim} and v_head_dim {dim}: needs multiples of 16"):
                PHASES[phase](request, "cuda")
            continue
        case = make_case(request, phase, device="cuda", oracle="cuda")
        assert_right(case.check(PHASES[phase](request, "cuda")))


@pytest.mark.parametrize(
    ("dim", "v_dim", "served"), [(40, 24, False), (80, 72, False), (72, 72, False), (80, 48, True)]
)
def test_odd_heads_are_refused(dim: int, v_dim: int, served: bool) -> None:  # requirement A5, B5
    """In prefill and extend, also on archs that none was run on; decode takes them."""
    cache = {"page_size": 16, "kv_layout": "NHD"}
    for device in ("nvidia:sm_90,cuda=13.0,driver=580.65", "nvidia:sm_80,cuda=13.0,driver=580.65", "rocm:gfx942"):
        with hal.simulate(devices=device, libraries={"torch": "2.11.0", "triton": "3.6.0"}):
            for phase in PHASES:
                request = AttentionRequest(
                    num_q_heads=6, num_kv_heads=2, head_dim=dim, v_head_dim=v_dim, phases=(phase,),
                    **(cache if phase != "prefill" else {}),
                )  # fmt: skip
                candidates = hal.select(request).choices[phase].candidates
                (found,) = (c for c in candidates if c.kernel.name == f"triton.{phase}")
                assert (not found.reasons) is (served or phase == "decode")
                if found.reasons:
                    assert "a multiple of 16 from 16 to 256" in str(found.reasons[0])
