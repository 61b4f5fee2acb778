"""The decision matrix with AMD's and Moore Threads' libraries installed: arch x libraries x model layer -> kernels.

``test_libraries.py`` is the same for NVIDIA. ``pytest tests/golden --update-golden`` writes ``vendor_libraries.json``
anew; what must hold whatever the file says is in the tests below.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

import hal
from hal.cli._models import MODELS, requests_for
from hal.testing import decision_matrix
from hal_ops import Request
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

GOLDEN = Path(__file__).parent / "vendor_libraries.json"

AITER, FLASH = {"amd-aiter": "0.1.20.post1"}, {"flash-attn": "2.8.3"}
TORCH_MUSA, MATE = {"torch": "2.7.1", "torch_musa": "2.7.1", "triton": "3.2.0"}, {"mate": "0.2.2"}
ROCM: dict[str, dict[str, str]] = {
    name: {"torch": "2.9.1", "triton": "3.4.0", **held}
    for name, held in {"aiter": AITER, "flash-attn": FLASH, "all": {**AITER, **FLASH}}.items()
}
MUSA: dict[str, dict[str, str]] = {"torch_musa": TORCH_MUSA, "all": {**TORCH_MUSA, **MATE}}
PLACES: dict[str, dict[str, dict[str, str]]] = {
    "rocm:gfx90a,hip=6.4": ROCM,
    "rocm:gfx942,hip=6.4": ROCM,
    "rocm:gfx950,hip=7.0": ROCM,
    "rocm:gfx1100,hip=6.4": ROCM,
    "rocm:gfx1151,hip=6.4": ROCM,
    "rocm:gfx1201,hip=6.4": ROCM,
    "rocm:gfx1250,hip=7.1": ROCM,
    "rocm:gfx1999,hip=9.0": ROCM,
    "musa:mp_21,musa=4.2": MUSA,
    "musa:mp_22,musa=4.2": MUSA,
    "musa:mp_31,musa=4.2": MUSA,
    "musa:mp_31,musa=4.3.6": MUSA,
    "musa:mp_99,musa=9.9": MUSA,
}
"""Device to sets of libraries; MATE needs MUSA 4.3.6."""
ALONE = ("Llama-3-8B", "GPT-OSS-120B sliding", "Gemma-2-9B sliding")
"""Layers that are looked at for each library alone; with all libraries, all models are."""


def layers(device: hal.Device, only: tuple[str, ...] = ()) -> dict[str, Request]:
    """Each model's layers, over the caches that the device has formats for; and a cache that is named by its layout."""
    found: dict[str, Request] = {}
    for model in MODELS:
        for cache, kinds in requests_for(model, device).items():
            for kind, request in kinds.items():
                name = f"{model.name} {kind}".strip()
                if not only or name in only:
                    found[f"{name} {cache}".strip()] = request
                    if cache == "fp8" and isinstance(request, MlaAttentionRequest):
                        found[f"{name} {cache}, FP8 queries"] = request.replace(fp8_query=True)
    return {**found, "keys in vectors": AttentionRequest(num_q_heads=32, num_kv_heads=8, head_dim=128, kv_layout="HDN")}


@functools.cache
def matrix() -> dict[str, dict[str, str]]:
    """Device and libraries to layer to its kernels in one line."""
    found: dict[str, dict[str, str]] = {}
    for place, sets in PLACES.items():
        for name, libraries in sets.items():
            with hal.simulate(place, libraries=libraries):
                asked = layers(hal.device(), () if name == "all" else ALONE)
                (row,) = decision_matrix([place], asked).values()
            cells = {layer: ", ".join(k or "none" for k in cell.values()) for layer, cell in row.items()}
            found[f"{place} with {name}"] = cells
    return found


def test_choices_are_those_of_the_golden_file(request: pytest.FixtureRequest) -> None:
    # requirement B2, B13, P50, R15, X16
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
    # aiter's assembly and CK for prompts, its Triton kernel over pages of 128, which alone reads FP8 caches.
    ("rocm:gfx942,hip=6.4", "Llama-3-8B bfloat16"): "aiter.prefill, aiter_triton.extend, aiter_triton.decode",
    ("rocm:gfx950,hip=7.0", "GPT-OSS-120B sliding fp8"): "aiter.prefill, aiter_triton.extend, aiter_triton.decode",
    # A cache for aiter's HIP decode, which nothing of aiter's extends.
    ("rocm:gfx942,hip=6.4", "keys in vectors"): "aiter.prefill, triton.extend, aiter_pa.decode",
    ("rocm:gfx950,hip=7.0", "keys in vectors"): "aiter.prefill, triton.extend, aiter_pa.decode",
    ("rocm:gfx90a,hip=6.4", "keys in vectors"): "fa2_ck.prefill, triton.extend, triton.decode",
    # CDNA2 is not aiter's: flash-attention's CK, but where it lacks sinks or drops caps.
    ("rocm:gfx90a,hip=6.4", "Llama-3-70B bfloat16"): "fa2_ck.prefill, fa2_ck.extend, fa2_ck.decode",
    ("rocm:gfx90a,hip=6.4", "Gemma-2-9B sliding bfloat16"): "triton.prefill, triton.extend, triton.decode",
    # RDNA: CK and assembly are for CDNA; aiter's Triton kernel where aiter says so, else the portable ones.
    ("rocm:gfx1151,hip=6.4", "Qwen3-32B bfloat16"): "triton.prefill, aiter_triton.extend, aiter_triton.decode",
    ("rocm:gfx1250,hip=7.1", "Qwen3-32B fp8"): "triton.prefill, triton.extend, triton.decode",
    ("rocm:gfx1999,hip=9.0", "Mistral-7B-v0.1 float16"): "triton.prefill, triton.extend, triton.decode",
    # MATE from MUSA 4.3.6 on; before, muDNN's flash kernel for prompts. mp_22 has no Triton.
    ("musa:mp_31,musa=4.3.6", "GPT-OSS-120B full bfloat16"): "mate.prefill, mate.extend, mate.decode",
    ("musa:mp_31,musa=4.2", "Llama-3-8B bfloat16"): "torch_musa.prefill, triton.extend, triton.decode",
    ("musa:mp_22,musa=4.2", "Llama-3-8B bfloat16"): "torch_musa.prefill, torch_musa.extend, torch_musa.decode",
}
"""What somebody who knows the libraries would take where all are installed."""


@pytest.mark.parametrize(("place", "layer"), EXPERT)
def test_an_experts_choice(place: str, layer: str) -> None:  # requirement B13, X16
    assert matrix()[f"{place} with all"][layer] == EXPERT[place, layer]


ONLY = {
    "gfx90a": {"fa2_ck", "sdpa_aotriton_flash", "triton"},
    "gfx942": {"aiter", "aiter_pa", "aiter_triton", "fa2_ck", "triton"},
    "gfx950": {"aiter", "aiter_pa", "aiter_triton", "fa2_ck", "triton"},
    "gfx1100": {"aiter_triton", "triton"},
    "gfx1151": {"aiter_triton", "triton"},
    "gfx1201": {"aiter_triton", "triton"},
    "gfx1250": {"triton"},
    "gfx1999": {"triton"},
    "mp_21": {"reference", "torch"},
    "mp_22": {"torch_musa", "reference", "torch"},
    "mp_31": {"mate", "torch_musa", "triton"},
    "mp_99": {"reference", "torch"},
}
"""Whose kernels an arch may get. An arch that nobody has heard of gets no other one's."""


@pytest.mark.parametrize("arch", ONLY)
def test_no_arch_is_taken_for_another(arch: str) -> None:  # requirement X16, R15, P18, C9
    cells = [c for place, row in matrix().items() if f":{arch}," in place for c in row.values()]
    chosen = {kernel.rpartition(".")[0] for cell in cells for kernel in cell.split(", ")}
    assert chosen
    assert chosen <= ONLY[arch]


@pytest.mark.parametrize("place", PLACES)
def test_every_model_is_explained_in_full(place: str) -> None:  # requirement B1, E6, X19, P28
    with hal.simulate(place, libraries=PLACES[place]["all"]):
        for request in layers(hal.device()).values():
            selection = hal.select(request)
            text = selection.explain()
            for choice in selection.choices.values():
                assert choice.kernel is not None
                assert choice.kernel.name in text
                refused = [c for c in choice.candidates if c.status == "refused"]
                assert all(r.code and r.text for c in refused for r in c.reasons)
                listed = [r.text for c in refused for r in c.reasons if r.code == "arch_not_listed"]
                assert all(f"this is {hal.device().arch.name}" in line for line in listed)
