"""What prefill and extend in Triton do with FP8, by arch: which heads they take, and what is multiplied as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal
from hal_ops._gpu import Gpu
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_configs import keys_as_they_are
from hal_ops.attention.triton_extend import extend
from hal_ops.attention.triton_limits import fp8_heads, fp8_heads_on
from hal_ops.attention.triton_prefill import prefill


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
    return AttentionRequest(**{**base, "phases": "prefill", **fields})


def test_archs_that_multiply_fp8() -> None:
    request = request_of(qkv_dtype="float8_e4m3fn", head_dim=128)
    archs = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "")
    found = [arch for arch in archs if keys_as_they_are(arch, request, 128, 0)]
    assert found == ["sm_89", "sm_90", "sm_100", "sm_120", "gfx950", "gfx1201"]
    fnuz = request.replace(qkv_dtype="float8_e4m3fnuz")
    assert [arch for arch in archs if keys_as_they_are(arch, fnuz, 128, 0)] == ["gfx942"]
    assert not keys_as_they_are("sm_89", request, 16, 0), "Triton multiplies 32 columns at least"
    assert not keys_as_they_are("sm_89", request, 32, 16)
    dims = [n for n in (40, 64, 80, 128, 256) if keys_as_they_are("sm_90", request.replace(head_dim=n), 128, 0)]
    assert dims == [64, 80, 128], "no others were run there"
    assert not keys_as_they_are("sm_90", request.replace(dtype="float32"), 128, 0)
    assert not keys_as_they_are("sm_90", request.replace(qkv_dtype="float16"), 128, 0)
    assert not keys_as_they_are("gfx950", request.replace(head_dim=256), 256, 0), "registers would be spilled"


HEADS = [
    (40, 64, False),
    (64, 16, False),
    (72, 64, False),
    (64, 40, False),
    (64, 32, True),
    (80, 80, True),
    (256, 256, True),
]


@pytest.mark.parametrize(("head_dim", "v_head_dim", "served"), HEADS)
def test_fp8_heads_that_went_wrong_on_hopper_are_refused(head_dim: int, v_head_dim: int, served: bool) -> None:
    # requirement B7, B5
    """By the declarations in each phase; on other archs decode takes them, which pads all."""
    dims = {"head_dim": head_dim, "v_head_dim": v_head_dim}
    cache: dict[str, Any] = {"page_size": 16, "kv_layout": "NHD", "kv_dtype": "float8_e4m3fn"}
    fresh = request_of(**dims, qkv_dtype="float8_e4m3fn")
    assert (not fp8_heads(fresh, cached=False)) is served
    assert not fp8_heads(request_of(**dims), cached=False)
    stored = request_of(**dims, **cache, phases="decode")
    assert (not fp8_heads_on("sm_90", stored)) is served
    assert not fp8_heads_on("sm_100", stored)
    for arch in ("sm_90", "sm_100"):
        with hal.simulate(f"nvidia:{arch},cuda=13.0,driver=580.65", libraries={"torch": "2.11.0", "triton": "3.6.0"}):
            for phase in ("prefill", "extend", "decode"):
                request = fresh if phase == "prefill" else request_of(**dims, **cache, phases=phase)
                found = hal.select(request).choices[phase]
                taken = served or (phase, arch) == ("decode", "sm_100")
                assert (str(found.kernel and found.kernel.name) == f"triton.{phase}") is taken


@pytest.mark.parametrize(
    ("dim", "fp8", "text"),
    [(32, True, "head_dim 32 and v_head_dim 32 in FP8: needs"), (40, False, "head_dim 40 .*: needs multiples of 16; ")],
)
@pytest.mark.parametrize("arch", ["sm_90", "gfx950", ""])
@pytest.mark.parametrize("phase", ["prefill", "extend"])
def test_the_functions_say_so_too(
    phase: str, arch: str, dim: int, fp8: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every GPU, also one whose arch nobody tells them."""
    fields: dict[str, Any] = {"head_dim": dim, "phases": phase}
    if fp8:
        fields |= {"qkv_dtype" if phase == "prefill" else "kv_dtype": "float8_e4m3fn"}
    if phase == "extend":
        fields |= {"page_size": 16, "kv_layout": "NHD"}
    make: Any = prefill if phase == "prefill" else extend
    monkeypatch.setattr(
        f"hal_ops.attention.triton_{phase}.gpu_of", lambda device: Gpu(arch, 1, torch.device("cuda", 0))
    )
    with pytest.raises(ValueError, match=f"{text}.*were wrong on sm_90, the only arch"):
        make(request_of(**fields), "cuda")
