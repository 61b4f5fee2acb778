"""The rows of ``errata.json``: what is known to be wrong is refused, with its link, and what is not is chosen as before."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal._near import near_misses
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

LLAMA: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
RACE, TAILS, SHORT = "xqa-output-race", "trtllm-gen-v-tails-sm103", "fmha-v2-short-padded-keys"


def why(kernel: str, arch: str, version: str, **fields: Any) -> list[str]:
    """The ids of the rows that refuse a kernel."""
    with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries={"flashinfer-python": version, "torch": "2.13.0"}):
        selection = hal.select(AttentionRequest(**{**LLAMA, **fields}))
    candidates = selection.choices[kernel.partition(".")[2]].candidates
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
