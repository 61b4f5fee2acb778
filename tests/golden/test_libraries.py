"""The decision matrix with NVIDIA's libraries installed: arch x libraries x model layer -> kernel a phase.

The file is read as the choices of an expert: each library alone, and all of them. ``pytest tests/golden --update-golden``
writes it anew; what must hold whatever the file says is in the tests below.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import hal
from hal.cli._models import MODELS, requests_for
from hal.testing import decision_matrix
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

GOLDEN = Path(__file__).parent / "libraries.json"
CUDA = "13.0,driver=580.65"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
BASE = {"torch": "2.11.0", "triton": "3.6.0"}
FA4 = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.0"}
SETS: dict[str, dict[str, str]] = {
    "flash-attn": {"flash-attn": "2.8.3"},
    "flash-attn-3": {"flash-attn-3": "3.0.0"},
    "tokenspeed-fa3": {"tokenspeed-fa3": "3.0.0.post20260810"},
    "flash-attn-4": FA4,
    "flashinfer 0.6.13": {"flashinfer-python": "0.6.13"},
    "flashinfer 0.7.4": {"flashinfer-python": "0.7.4", "nvidia-cudnn-frontend": "1.32.0"},
}
SETS["all"] = {name: v for held in SETS.values() for name, v in held.items() if name != "flash-attn-3"}
ALONE = ("Llama-3-8B", "GPT-OSS-120B sliding", "Gemma-2-9B sliding")
"""Layers that are looked at for each library alone; with all libraries, all models are."""
FP8 = "float8_e4m3fn"
HOST = hal.Device(platform="cpu", arch=hal.Arch("cpu", "any"), capabilities=frozenset({"bf16"}))


def layers(only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Each model's layers over a bfloat16 and an e4m3 cache, and two that permit FP8 queries."""
    found: dict[str, Any] = {}
    for model in MODELS:
        for cache, kinds in requests_for(model, HOST).items():
            for kind, request in kinds.items():
                name = f"{model.name} {kind}".strip()
                if not only or name in only:
                    found[f"{name} {cache}".strip()] = request
                    if cache and isinstance(request, (AttentionRequest, MlaAttentionRequest)):
                        found[f"{name} {FP8}"] = request.replace(kv_dtype=FP8)
    fresh = found[f"{ALONE[0]} {FP8}"].replace(kv_dtype="bfloat16", qkv_dtype=FP8, phases=("prefill",))
    names = [name for name in (f"{ALONE[0]} {FP8}", f"DeepSeek-V3 {FP8}") if name in found]
    permitted = {f"{name}, FP8 queries": found[name].replace(fp8_query=True) for name in names}
    return {**found, **permitted, f"{ALONE[0]} q, k, v {FP8}": fresh}


@functools.cache
def matrix() -> dict[str, dict[str, str]]:
    """Arch and libraries to layer to its kernels in one line."""
    found: dict[str, dict[str, str]] = {}
    for name, libraries in SETS.items():
        with hal.simulate(libraries={**BASE, **libraries}):
            rows = decision_matrix(
                [f"nvidia:{arch},cuda={CUDA}" for arch in ARCHS], layers(() if name == "all" else ALONE)
            )
        for arch, row in zip(ARCHS, rows.values(), strict=True):
            found[f"{arch}, {name}"] = {n: ", ".join(k or "none" for k in cell.values()) for n, cell in row.items()}
    return found


def test_choices_are_those_of_the_golden_file(request: pytest.FixtureRequest) -> None:
    # requirement B2, B13, D10, D11
    found = matrix()
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    changed = [
        f"{place} | {name}: {expected.get(place, {}).get(name)} -> {cell}"
        for place, row in found.items()
        for name, cell in row.items()
        if expected.get(place, {}).get(name) != cell
    ]
    assert not changed, "choices changed; if that is meant, pytest tests/golden --update-golden:\n" + "\n".join(changed)
    assert {p: set(r) for p, r in expected.items()} == {p: set(r) for p, r in found.items()}


EXPERT = {
    # Ampere and Ada: flash-attention 2's algorithm; flashinfer's decode; an FP8 cache is flashinfer's alone on 8.0.
    ("sm_80", "Llama-3-8B bfloat16"): "fa2.prefill, flashinfer_fa2.extend, flashinfer_fa2.decode",
    ("sm_80", f"Llama-3-8B {FP8}"): "fa2.prefill, flashinfer_fa2.extend, flashinfer_fa2.decode",
    ("sm_89", "GPT-OSS-120B full bfloat16"): "triton.prefill, flashinfer_sink.extend, flashinfer_sink.decode",
    # Hopper: flash-attention 3 for prompts, the portable decode, which was measured to be faster (benchmarks/results).
    ("sm_90", "Llama-3-70B bfloat16"): "fa3.prefill, fa3.extend, triton.decode",
    ("sm_90", f"Llama-3-8B {FP8}"): "fa3.prefill, triton.extend, triton.decode",
    ("sm_90", f"Llama-3-8B {FP8}, FP8 queries"): "fa3.prefill, fa3.extend, triton.decode",
    ("sm_90", "GPT-OSS-120B sliding bfloat16"): "fa3.prefill, fa3.extend, triton.decode",
    ("sm_90", "Gemma-2-9B sliding bfloat16"): "flashinfer_fa3.prefill, flashinfer_fa3.extend, triton.decode",
    # Blackwell's datacenter chips: flash-attention 4 for prompts, trtllm-gen over pages.
    ("sm_100", "Qwen3-32B bfloat16"): "fa4.prefill_sm100, trtllm_gen.extend, trtllm_gen.decode",
    ("sm_103", f"Llama-3-8B {FP8}, FP8 queries"): "fa4.prefill_sm100, trtllm_gen.extend, trtllm_gen.decode",
    ("sm_100", "GPT-OSS-120B sliding bfloat16"): "fa4.prefill_sm100, trtllm_gen.extend, trtllm_gen.decode",
    ("sm_100", "Gemma-2-9B full bfloat16"): "fa2.prefill, flashinfer_fa2.extend, flashinfer_fa2.decode",
    # Latents in FP8 are trtllm-gen's with FP8 queries; flashinfer's wrappers of 0.7 wait for the device.
    ("sm_100", f"DeepSeek-V3 {FP8}, FP8 queries"): "triton.mla_extend, trtllm_gen.mla_decode",
    ("sm_100", f"DeepSeek-V3 {FP8}"): "triton.mla_extend, triton.mla_decode",
    ("sm_90", f"DeepSeek-V3 {FP8}"): "triton.mla_extend, triton.mla_decode",
    # RTX Blackwell is not one of those: no trtllm-gen, no flash-attention 3, no paged flash-attention 4.
    ("sm_120", "Mistral-7B-v0.1 bfloat16"): "fa2.prefill, flashinfer_fa2.extend, flashinfer_fa2.decode",
    ("sm_121", "GPT-OSS-120B full bfloat16"): "fmha_v2.prefill, flashinfer_sink.extend, flashinfer_sink.decode",
}
"""What somebody who knows the libraries would take where all are installed."""


@pytest.mark.parametrize(("arch", "layer"), EXPERT)
def test_an_expert_s_choice(arch: str, layer: str) -> None:  # requirement B13, B14, D10, D11
    assert matrix()[f"{arch}, all"][layer] == EXPERT[arch, layer]


def test_nothing_runs_on_the_reference_where_libraries_are() -> None:
    for arch in ARCHS:
        bad = {layer: cell for layer, cell in matrix()[f"{arch}, all"].items() if "none" in cell}
        slow = {layer for layer, cell in matrix()[f"{arch}, all"].items() if "reference" in cell}
        assert not bad
        # Triton converts no e4m3 before 8.9, and flashinfer reads FP8 with head dim 128 alone.
        assert all(FP8 in layer and arch in ("sm_80", "sm_86") for layer in slow), (arch, slow)


NOT_THERE = {
    "sm_80": ("flashinfer_fa3", "trtllm_gen", "fa4.extend", "fa4.decode", "xqa", "fmha_v2", "flashinfer_cudnn"),
    "sm_89": ("fa3", "flashinfer_fa3", "trtllm_gen", "xqa", "fmha_v2", "flashinfer_cudnn"),
    "sm_90": ("trtllm_gen", "fmha_v2", "flashinfer_cudnn", "fa4.prefill_sm100"),
    "sm_100": ("fa3", "flashinfer_fa3", "fmha_v2"),
    "sm_120": ("fa3", "flashinfer_fa3", "trtllm_gen", "flashinfer_cudnn", "fa4.extend", "fa4.decode"),
    "sm_121": ("fa3", "flashinfer_fa3", "trtllm_gen", "flashinfer_cudnn", "fa4.extend", "fa4.decode"),
}


@pytest.mark.parametrize("arch", NOT_THERE)
def test_no_arch_is_taken_for_another(arch: str) -> None:  # requirement D10, E9, D11
    """Sets that hold what an arch lacks choose none of it, alone or among others."""
    absent = tuple(name if "." in name else f"{name}." for name in NOT_THERE[arch])
    for name in SETS:
        for layer, cell in matrix()[f"{arch}, {name}"].items():
            assert not [k for k in cell.split(", ") if k.startswith(absent)], (name, layer, cell)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_refusal_has_reasons_that_say_what_is_here(arch: str) -> None:  # requirement B1, E6, X19, P28
    request = layers()["GPT-OSS-120B sliding bfloat16"]
    with hal.simulate(f"nvidia:{arch},cuda={CUDA}", libraries={**BASE, **SETS["all"]}):
        selection = hal.select(request)
    for choice in selection.choices.values():
        assert choice.kernel is not None
        for candidate in choice.candidates:
            if candidate.status == "refused":
                assert all(r.code and r.text for r in candidate.reasons)
                listed = [r.text for r in candidate.reasons if r.code == "arch_not_listed"]
                assert all(arch in text for text in listed)
