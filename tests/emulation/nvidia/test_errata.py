"""The rows of ``errata.json``: what is known to be wrong is refused, with its link, and what is not is chosen as before."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal._near import near_misses
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

LLAMA: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
TRAINED: dict[str, Any] = {"needs_grad": True, "phases": "prefill"}
RACE, TAILS, SHORT = "xqa-output-race", "trtllm-gen-v-tails-sm103", "fmha-v2-short-padded-keys"
HEAD_80 = {"head_dim": 80, **TRAINED}


def why(kernel: str, arch: str, version: str, library: str = "flashinfer-python", **fields: Any) -> list[str]:
    """The ids of the rows that refuse a kernel."""
    libraries = {library: version, "torch": "2.13.0", "nvidia-cutlass-dsl": "4.8.1"}
    with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries=libraries):
        selection = hal.select(AttentionRequest(**{**LLAMA, **fields}))
    candidates = selection.choices[kernel.partition(".")[2].partition("_")[0]].candidates
    reasons = next(c.reasons for c in candidates if c.kernel.name == kernel)
    return [r.text.rpartition("[")[2].rstrip("]") for r in reasons if r.code == "version_known_bad"]


@pytest.mark.parametrize(
    ("kernel", "arch", "version", "fields", "found"),
    [
        ("xqa.decode", "sm_90", "0.6.13", {}, [RACE]),
        ("xqa.decode", "sm_120", "0.6.16", {}, [RACE]),
        ("xqa.decode", "sm_120", "0.6.17", {}, []),
        ("trtllm_gen.extend", "sm_103", "0.6.13", {}, [TAILS]),
        ("trtllm_gen.extend", "sm_103", "0.7.2", {"dtype": "float16"}, [TAILS]),
        ("trtllm_gen.extend", "sm_103", "0.6.18", {"kv_dtype": "fp8"}, []),
        ("trtllm_gen.extend", "sm_100", "0.6.13", {}, []),
        ("trtllm_gen.decode", "sm_103", "0.6.13", {}, []),
        ("fmha_v2.prefill", "sm_120", "0.6.13", {}, [SHORT]),
        ("fmha_v2.prefill", "sm_120", "0.6.16", {}, []),
    ],
)
def test_a_row_refuses_what_it_is_about(
    kernel: str, arch: str, version: str, fields: dict[str, Any], found: list[str]
) -> None:  # requirement D13, D15
    assert why(kernel, arch, version, **fields) == found


@pytest.mark.parametrize(
    ("kernel", "arch", "fields", "found", "mended"),
    [
        ("fa4.prefill_sm80", "sm_80", {}, "fa4-surplus-tiles", "4.0.0b30"),
        ("fa4.prefill_sm80", "sm_120", {}, "fa4-surplus-tiles", "4.0.0b30"),
        ("fa4.prefill", "sm_90", HEAD_80, "fa4-backward-head-80-sm90", ""),
        ("fa4.prefill_sm100", "sm_103", HEAD_80, "fa4-backward-head-80-sm100", "4.0.0b30"),
    ],
)
def test_rows_about_flash_attention_4(
    kernel: str, arch: str, fields: dict[str, Any], found: str, mended: str
) -> None:  # requirement D13, P45
    """tokenspeed-fa4 is 4.0.0b27, so that nothing is mended there; without gradients, forward passes are right."""
    assert why(kernel, arch, "4.0.0b29", "flash-attn-4", **fields) == [found]
    assert why(kernel, arch, mended or "4.0.0b36", "flash-attn-4", **fields) == ([] if mended else [found])
    assert why(kernel, arch, "4.0.0.post20260923", "tokenspeed-fa4", **fields) == [found + "-tokenspeed" * bool(mended)]
    if fields:
        plain = {name: value for name, value in fields.items() if name != "needs_grad"}
        assert why(kernel, arch, "4.0.0b29", "flash-attn-4", **plain) == []


@pytest.mark.parametrize("library", ["nvidia-cudnn-cu12", "nvidia-cudnn-cu13"])
def test_an_old_cudnn_is_refused(library: str) -> None:  # requirement D13
    """As torch's own choice of it does: wheels for CUDA 12.6 bring 9.10."""
    for version, refused in (("9.10.2.21", True), ("9.15.0.57", True), ("9.15.1.9", False), ("9.19.0.56", False)):
        assert bool(why("sdpa_cudnn.prefill", "sm_90", version, library)) == refused, version


@pytest.mark.parametrize("version", ["0.6.13", "0.7.2.post1"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_fa2_of_flashinfer_loses_keys_to_the_right_of_a_window(arch: str, version: str) -> None:
    # requirement D13, D3, P22
    """flashinfer#4972; fa3 does not, nor do rows of one query, which see no key to their right."""
    left = {"causal": False, "window": (333, None)}
    libraries = {"flashinfer-python": version, "torch": "2.13.0"}

    def refused(**fields: Any) -> list[str]:
        with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries=libraries):
            choices = hal.select(AttentionRequest(**{**LLAMA, **left, **fields})).choices.values()
        kernels = ((c.kernel.name, c.reasons) for choice in choices for c in choice.candidates)
        return sorted(name for name, reasons in kernels if any("4972" in r.text for r in reasons))

    fa2, sink = ["flashinfer_fa2.extend", "flashinfer_fa2.prefill"], ["flashinfer_sink.extend"] * (arch != "sm_90")
    assert refused() == [*fa2, *sink]
    assert refused(max_q_len=4) == ["flashinfer_fa2.decode", *fa2, "flashinfer_sink.decode", *sink]
    assert refused(causal=True, window=(333, 0)) == refused(window=(None, None)) == []


CACHES = ({}, {"kv_dtype": "fp8"})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_103", "sm_120"])
@pytest.mark.parametrize("version", ["0.6.4", "0.6.13", "0.7.2.post1"])
@pytest.mark.parametrize(
    "fields", [*CACHES, {"sinks": True, "head_dim": 64}, {"softcap": 30.0, "head_dim": 256}], ids=str
)
def test_no_near_miss_has_an_empty_step(arch: str, version: str, fields: dict[str, Any]) -> None:  # requirement X19
    libraries = {"flashinfer-python": version, "torch": "2.13.0", "tokenspeed-fa3": "3.0.0.post20260810"}
    with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries=libraries):
        requests = [AttentionRequest(**{**LLAMA, **fields})]
        requests += [MlaAttentionRequest(num_q_heads=128, **fields)] if fields in CACHES else []
        for request in requests:
            for miss in near_misses(hal.select(request)):
                assert all(miss.install), miss
                assert miss.changes or miss.install, miss


def test_a_permission_is_a_smaller_change_than_another_cache() -> None:  # requirement X19
    libraries = {"tokenspeed-fa3": "3.0.0.post20260810", "torch": "2.13.0", "triton": "3.9.0"}
    with hal.simulate("nvidia:sm_90,cuda=13.0", libraries=libraries):
        texts = [m.text() for m in near_misses(hal.select(AttentionRequest(**LLAMA, kv_dtype="fp8")))]
        assert "with fp8_query: fa3.extend would be chosen" in texts
        granted = hal.select(AttentionRequest(**LLAMA, kv_dtype="fp8", fp8_query=True))
        assert granted.kernels()["extend"] == "fa3.extend"
