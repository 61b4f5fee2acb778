"""Joint choice: what is left open is decided for all phases, and for all layers, together."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal._selection import select_together
from hal.errors import InputError
from hal_ops.attention import PHASES, AttentionRequest


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


def test_a_page_size_is_found_that_suits_all_phases(fake_platform: Any, attention_kernel: Any) -> None:
    fake_platform(
        kernels=[
            attention_kernel("a.prefill"),
            attention_kernel("a.extend", fields={"page_size": hal.MultipleOf(64)}),
            attention_kernel("a.decode", fields={"page_size": hal.OneOf(16, 128)}),
        ]
    )
    selection = hal.select(request())
    assert selection.request.page_size == 128
    assert selection.kernels() == {p: f"a.{p}" for p in PHASES}
    assert "page_size 128" in selection.joint


def test_a_page_size_beyond_the_usual_ones_is_found(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("odd", fields={"page_size": hal.OneOf(784)}))
    assert hal.select(request()).request.page_size == 784


def test_the_usual_value_is_kept_when_nothing_is_gained(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("free", fields={"page_size": hal.Range(1, None), "kv_layout": hal.Anything()}))
    decided = hal.select(request()).request
    assert (decided.page_size, decided.kv_layout) == (16, "NHD")


def test_the_layout_follows_the_kernels(fake_platform: Any, library: Any) -> None:  # requirement D8
    fake_platform(kernels=library("hnd", fields={"kv_layout": hal.OneOf("HND")}))
    assert hal.select(request()).request.kv_layout == "HND"
    refused = hal.select(request(kv_layout="NHD")).choices["decode"].candidates
    (reason,) = next(c.reasons for c in refused if c.kernel.name == "hnd.decode")
    assert reason.code == "layout"


def test_what_the_caller_fixes_stays(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("big", fields={"page_size": hal.OneOf(128)}))
    selection = hal.select(request(page_size=16))
    assert selection.request.page_size == 16
    assert selection.kernels()["decode"] == "reference.decode"
    assert selection.kernels()["prefill"] == "big.prefill"


def test_serving_every_phase_counts_more_than_one_fast_phase(fake_platform: Any, attention_kernel: Any) -> None:
    fake_platform(
        kernels=[
            attention_kernel("fast.decode", fields={"page_size": hal.OneOf(128)}),
            attention_kernel("slow.decode", fields={"page_size": hal.OneOf(32)}, priority=hal.Band.PERFORMANT),
            attention_kernel("slow.extend", fields={"page_size": hal.OneOf(32)}, priority=hal.Band.PERFORMANT),
            attention_kernel("slow.prefill", priority=hal.Band.PERFORMANT),
        ]
    )
    with hal.override(strict=True):
        selection = hal.select(request())
    assert selection.request.page_size == 32
    assert selection.complete


def test_forced_kernels_take_part_in_the_joint_choice(fake_platform: Any, library: Any) -> None:
    small = library("small", fields={"page_size": hal.OneOf(16)})
    fake_platform(kernels=[*small, *library("big", fields={"page_size": hal.OneOf(128)}, priority=hal.Band.PORTABLE)])
    assert hal.select(request()).request.page_size == 16
    selection = hal.select(request(), kernel="big")
    assert selection.request.page_size == 128
    assert selection.kernels()["decode"] == "big.decode"


def test_layers_of_one_model_get_one_layout(fake_platform: Any, library: Any) -> None:  # requirement P33
    window = library("window", fields={"window": hal.Windows(), "kv_layout": hal.OneOf("HND")})
    full = library("full", fields={"kv_layout": hal.OneOf("NHD", "HND"), "page_size": hal.OneOf(16, 64)})
    fake_platform(kernels=[*window, *full])
    layers = [request(), request(window=128)]
    alone = [hal.select(layer).request.kv_layout for layer in layers]
    together = [s.request.kv_layout for s in select_together(layers)]
    assert alone == ["NHD", "HND"]
    assert together == ["HND", "HND"]


def test_layers_that_fix_different_layouts_are_an_error(fake_platform: Any) -> None:  # requirement P33
    with pytest.raises(InputError, match="different kv_layout: 'NHD' by layers 0; 'HND' by layers 1, 2"):
        hal.get_attentions([request(kv_layout="NHD"), request(kv_layout="HND"), request(kv_layout="HND")])


def test_an_encoder_needs_no_cache(fake_platform: Any, attention_kernel: Any) -> None:
    fake_platform(kernels=[attention_kernel("enc.prefill", fields={"causal": hal.OneOf(False)})])
    selection = hal.select(request(causal=False, phases=("prefill",)))
    assert selection.kernels() == {"prefill": "enc.prefill"}
    assert selection.joint == ()


def test_training_asks_for_prefill_alone() -> None:
    assert request(needs_grad=True).phases == ("prefill",)
