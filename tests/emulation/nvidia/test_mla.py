"""Latent attention through flash-attention 3: by value at the corners of its declaration, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia, signatures
from emulated.library import Installed

import hal
from hal import testing
from hal_ops.mla_attention import PHASES, MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case

KERNEL = "flash_attn_with_kvcache"
FA3 = {"torch": "2.13.0", "flash-attn-3": "3.0.0"}


@pytest.fixture
def fa3() -> Iterator[Installed]:
    hal.reset()
    with nvidia.running("fa3", libraries=nvidia.MLA) as held:
        assert held is not None
        yield held
    hal.reset()


def request_of(**fields: Any) -> MlaAttentionRequest:
    return MlaAttentionRequest(**{"num_q_heads": 4, "page_size": 16, **fields})


@pytest.mark.parametrize("phase", PHASES)
def test_a_kernel_is_right_at_the_corners_of_its_declaration(phase: str, fa3: Installed) -> None:
    kernel = hardware.kernel_named(f"fa3.mla_{phase}")
    given = testing.corners(kernel, device=hardware.device_of("sm_90"))
    assert len(given) > 10
    wrong = [str(r) for r in (hardware.check(kernel, request) for request in given) if not r.ok]
    assert wrong == []
    assert fa3.called(KERNEL)


@pytest.mark.parametrize("version", signatures.versions("flash-attn-3"))
def test_calls_bind_to_the_signatures_of_every_version(version: str) -> None:
    with nvidia.running("fa3", "flash-attn-3", version, libraries=nvidia.MLA):
        for phase in PHASES:
            result = hardware.check(f"fa3.mla_{phase}", request_of(return_lse=True, max_q_len=2))
            assert result.ok, str(result)


def test_the_latent_is_the_value_and_part_of_the_key(fa3: Installed) -> None:
    result = hardware.check("fa3.mla_decode", request_of(num_q_heads=128, softmax_scale=0.3))
    assert result.ok, str(result)
    call = fa3.called(KERNEL)[0].arguments
    assert call["q"].shape[1:] == (128, 64)
    assert call["qv"].shape[1:] == (128, 512)
    assert (call["k_cache"].shape[2:], call["v_cache"].shape[2:]) == ((1, 64), (1, 512))
    assert call["k_cache"].data_ptr() == call["v_cache"].data_ptr() + 2 * 512, "views of one cache"
    assert call["softmax_scale"] == 0.3


def test_a_graph_is_launched_for_the_longest_queries(fa3: Installed) -> None:
    from hal_nvidia import _flash_attn_3_mla

    for phase, bound in (("decode", 3), ("extend", 4)):
        request = request_of(graph=True, max_q_len=3)
        made = getattr(_flash_attn_3_mla, phase)(request, hardware.device_of("sm_90"))
        case = make_case(request, phase, lengths=[(1, 20), (2, 9), (1, 5)])
        assert made.plan(case.args[2]) == bound
    assert made.plan(make_case(request, "extend", lengths=[(0, 5)]).args[2]) == 0


def test_no_keys_and_no_queries_reach_the_library_at_all(fa3: Installed) -> None:
    from hal_nvidia import _flash_attn_3_mla

    made: Any = _flash_attn_3_mla.extend(request_of(return_lse=True), hardware.device_of("sm_90"))
    case = make_case(request_of(dtype="float16"), "extend", lengths=[(0, 5)])
    out, lse = made(*case.args, made.plan(case.args[2]), return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((0, 4, 512), (0, 4), torch.float32)
    assert not fa3.called(KERNEL)


def reasons(device: str, libraries: dict[str, str], phase: str = "decode", **fields: Any) -> list[str]:
    with hal.simulate(device, libraries=libraries):
        choice = hal.select(request_of(**fields)).choices[phase]
    candidate = next(c for c in choice.candidates if c.kernel.name == f"fa3.mla_{phase}")
    return [r.text for r in candidate.reasons]


def test_what_is_refused() -> None:
    hopper = "nvidia:sm_90,cuda=12.8"
    assert reasons(hopper, FA3) == []
    assert reasons("nvidia:sm_80,cuda=12.8", FA3) == ["needs sm_90; this is sm_80"]
    wheel = {"torch": "2.13.0", "tokenspeed-fa3": "3.0.0.post20260810"}
    assert reasons(hopper, wheel) == ["tokenspeed-fa3 3.0.0.post20260810 was built without unequal head dims"]
    text = "page_size 64; needs no multiple of 64, where NaN in unused slots changes nothing"
    assert reasons(hopper, FA3, page_size=64, num_q_heads=128) == [text]
    assert reasons(hopper, FA3, page_size=64, num_q_heads=64) == []
    assert reasons(hopper, FA3, "extend", page_size=64, num_q_heads=4) == [text]
    assert reasons(hopper, FA3, qk_rope_head_dim=32)
    assert reasons(hopper, FA3, kv_lora_rank=256)


def test_a_handle_on_hopper_takes_pages_that_it_reads_right(fa3: Installed) -> None:
    handle = hal.get_mla_attention(num_q_heads=128, device=hardware.device_of("sm_90"), kernel="fa3")
    assert handle.request.page_size == 16
    assert (handle.kernels()["extend"], handle.kernels()["decode"]) == ("fa3.mla_extend", "fa3.mla_decode")
