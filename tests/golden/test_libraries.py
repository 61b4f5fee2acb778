"""The decision matrix with NVIDIA's libraries installed: arch x libraries x model layer -> kernel a phase, and why not.

Each library alone, and all of them. ``libraries.json`` is read as the choices of an expert: layers for which a set decides
alike stand together, and archs where it does. ``refusals.json`` has, for each library alone, the first reason why a kernel
of it is refused, for a few layers. ``pytest tests/golden --update-golden`` writes both anew; what must hold whatever the
files say is in the tests below.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.cli._models import MODELS, requests_for
from hal_ops import Request
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

CHOICES = Path(__file__).parent / "libraries.json"
REFUSALS = Path(__file__).parent / "refusals.json"
CUDA = "13.0,driver=580.65"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
BASE = {"torch": "2.11.0", "triton": "3.6.0"}
FA4 = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.0"}
SETS: dict[str, dict[str, str]] = {
    "torch alone": {},
    "flash-attn": {"flash-attn": "2.8.3"},
    "flash-attn-3": {"flash-attn-3": "3.0.0"},
    "tokenspeed-fa3": {"tokenspeed-fa3": "3.0.0.post20260810"},
    "flash-attn-4": FA4,
    "flashinfer 0.6.13": {"flashinfer-python": "0.6.13"},
    "flashinfer 0.7.4": {"flashinfer-python": "0.7.4", "nvidia-cudnn-frontend": "1.32.0"},
}
SETS["all"] = {name: v for held in SETS.values() for name, v in held.items() if name != "flash-attn-3"}
FP8 = "float8_e4m3fn"
HOST = hal.Device(platform="cpu", arch=hal.Arch("cpu", "any"), capabilities=frozenset({"bf16"}))
_HEADS: dict[str, Any] = {"num_q_heads": 48, "num_kv_heads": 8}
KINDS: dict[str, Request] = {
    "softcap, D128": AttentionRequest(**_HEADS, head_dim=128, softcap=30.0),
    "D96": AttentionRequest(**_HEADS, head_dim=96),
    "grouped heads, D192 and 128": AttentionRequest(**_HEADS, head_dim=192, v_head_dim=128, phases=("prefill",)),
    "pages of 128, heads first": AttentionRequest(**_HEADS, head_dim=128, page_size=128, kv_layout="HND"),
    "sinks, training": AttentionRequest(**_HEADS, head_dim=64, sinks=True, needs_grad=True, phases=("prefill",)),
}
"""Layers of no model of the list, for which there are kernels that are chosen for nothing else."""
_MEASURED = "on Hopper Triton's are above it, as they were measured, and take all that it takes"
UNCHOSEN = dict.fromkeys(("fa4.extend", "fa4.decode", "flashinfer_fa3.prefill", "flashinfer_fa3.extend"), _MEASURED)
"""Kernels that occur in no cell, and why."""
EXPLAINED = (
    "Llama-3-8B bfloat16", f"Llama-3-8B {FP8}", f"Llama-3-8B {FP8}, FP8 queries", "GPT-OSS-120B sliding bfloat16",
    "Gemma-2-9B sliding bfloat16", "DeepSeek-V3 bfloat16", f"DeepSeek-V3 {FP8}", "DeepSeek-V3 prompts",
)  # fmt: skip
"""Layers whose refusals are kept."""
NOT_OF_A_REQUEST = ("", "device", "library", "runtime", "driver", "setting")

Rows = dict[str, dict[str, str]]
"""Layer to arch to what is said there."""


def layers() -> dict[str, Request]:
    """Each model's layers over a bfloat16 and an e4m3 cache, two that permit FP8 queries, and other kinds."""
    found: dict[str, Request] = {}
    for model in MODELS:
        for cache, kinds in requests_for(model, HOST).items():
            for kind, request in kinds.items():
                name = f"{model.name} {kind}".strip()
                found[f"{name} {cache}".strip()] = request
                if cache and isinstance(request, (AttentionRequest, MlaAttentionRequest)):
                    found[f"{name} {FP8}"] = request.replace(kv_dtype=FP8)
    llama, deepseek = f"Llama-3-8B {FP8}", f"DeepSeek-V3 {FP8}"
    permitted = {f"{name}, FP8 queries": found[name].replace(fp8_query=True) for name in (llama, deepseek)}
    fresh = found[llama].replace(kv_dtype="bfloat16", qkv_dtype=FP8, phases=("prefill",))
    return {**found, **permitted, f"Llama-3-8B q, k, v {FP8}": fresh, **KINDS}


@functools.cache
def decided() -> tuple[dict[str, Rows], dict[str, dict[str, Rows]]]:
    """A set of libraries to its choices; and to its own kernels, each with why it is refused."""
    choices: dict[str, Rows] = {}
    refusals: dict[str, dict[str, Rows]] = {}
    asked = layers()
    for name, libraries in SETS.items():
        rows = choices.setdefault(name, {layer: {} for layer in asked})
        own = {kernel: {layer: {} for layer in EXPLAINED} for kernel in kernels_of(libraries)} if name != "all" else {}
        for arch in ARCHS:
            with hal.simulate(f"nvidia:{arch},cuda={CUDA}", libraries={**BASE, **libraries}):
                made = {request: hal.select(request) for request in dict.fromkeys(asked.values())}
            for layer, request in asked.items():
                rows[layer][arch] = ", ".join(k or "none" for k in made[request].kernels().values())
            for layer in EXPLAINED:
                for choice in made[asked[layer]].choices.values():
                    for c in (c for c in choice.candidates if c.kernel.name in own):
                        own[c.kernel.name][layer][arch] = _said(c.reasons[0]) if c.status == "refused" else ""
        refusals[name] = own
    return choices, {name: own for name, own in refusals.items() if own}


def kernels_of(libraries: Iterable[str]) -> list[str]:
    """NVIDIA's kernels of attention that need one of the libraries; those that need no more than torch, where none is."""
    return [
        kernel.name
        for kernel in nvidia_kernels()
        if {name for need in kernel.needs for name in need.names()} & set(libraries or BASE)
        and (libraries or all(need.library in BASE for need in kernel.needs))
    ]


def nvidia_kernels() -> list[hal.Kernel]:
    found = _plugins.registry().kernels.values()
    return [k for k in found if set(k.platforms) == {"nvidia"} and k.op in ("attention", "mla_attention")]


def _said(reason: hal.Reason) -> str:
    """The code, and the request's field that it is about."""
    return reason.code if reason.field in (*NOT_OF_A_REQUEST, reason.code) else f"{reason.code} {reason.field}"


@functools.cache
def matrix() -> Rows:
    """Arch and libraries to layer to its kernels in one line."""
    found: Rows = {}
    for name, rows in decided()[0].items():
        for layer, row in rows.items():
            for arch, kernels in row.items():
                found.setdefault(f"{arch}, {name}", {})[layer] = kernels
    return found


def _together(names: Mapping[str, str]) -> dict[str, str]:
    """What is said to all whom it is said of, in one text; nothing is said of whom nothing is said."""
    found: dict[str, list[str]] = {}
    for name, said in names.items():
        if said:
            found.setdefault(said, []).append(name)
    return {" ".join(held): said for said, held in found.items()}


def folded(rows: Rows) -> dict[str, dict[str, str]]:
    """Layers of which the same is said in one entry, and archs of which the same is said in one line."""
    groups: dict[str, list[str]] = {}
    for layer, row in rows.items():
        groups.setdefault(json.dumps(_together(row)), []).append(layer)
    return {" | ".join(names): json.loads(row) for row, names in groups.items() if row != "{}"}


def reasons_of(rows: Rows) -> dict[str, dict[str, str]]:
    """Refusals of one kernel: on archs where they are the same for every layer they are told once."""
    asked = {layer: row for layer, row in rows.items() if row}
    first = next(iter(asked.values()))
    always = {a: first[a] for a in ARCHS if first[a] and all(row[a] == first[a] for row in asked.values())}
    rest = {layer: {a: said for a, said in row.items() if a not in always} for layer, row in asked.items()}
    return folded({"every layer": always, **rest})


def unfolded(text: str, file: Mapping[str, Any], depth: int) -> dict[str, str]:
    """A file's lines, a name to what is said: keys from the outside in."""
    if depth == 0:
        return {f"{text} | {arch}": said for archs, said in file.items() for arch in archs.split(" ")}
    inner = [
        (f"{text} | {k}" if text else k, depth - 1, held) for names, held in file.items() for k in names.split(" | ")
    ]
    return {line: said for name, left, held in inner for line, said in unfolded(name, held, left).items()}


def _text(made: Mapping[str, Any]) -> str:
    """JSON with the innermost entries in one line where they fit."""

    def short(found: re.Match[str]) -> str:
        line = re.sub(r"\n *", " ", found[0]).replace("{ ", "{").replace(" }", "}")
        return line if len(line) <= 120 else found[0]

    return re.sub(r'^ *"[^\n]*": \{[^{}]+\}', short, json.dumps(made, indent=1), flags=re.MULTILINE) + "\n"


def check(path: Path, made: Mapping[str, Any], depth: int, update: bool) -> None:
    """Hold a file against what is decided now, cell by cell."""
    if update:
        path.write_text(_text(made))
    read = json.loads(path.read_text())
    expected, found = unfolded("", read, depth), unfolded("", made, depth)
    changed = [
        f"{cell}: {expected.get(cell, 'nothing')} -> {found.get(cell, 'nothing')}"
        for cell in dict.fromkeys((*expected, *found))
        if expected.get(cell) != found.get(cell)
    ]
    hint = "if that is meant, pytest tests/golden --update-golden"
    assert not changed, f"{path.name} says otherwise; {hint}:\n" + "\n".join(changed)
    assert read == made, f"{path.name} says the same in another form; {hint}"


def test_choices_are_those_of_the_golden_file(request: pytest.FixtureRequest) -> None:
    # requirement B2, B13, D10, D11, P50
    made = {name: folded(rows) for name, rows in decided()[0].items()}
    check(CHOICES, made, 2, request.config.getoption("--update-golden"))


def test_refusals_are_those_of_the_golden_file(request: pytest.FixtureRequest) -> None:
    # requirement B2, E6, P50
    made = {name: {k: reasons_of(rows) for k, rows in own.items()} for name, own in decided()[1].items()}
    check(REFUSALS, made, 3, request.config.getoption("--update-golden"))


def test_every_kernel_that_can_be_chosen_is_chosen_in_some_cell() -> None:  # requirement B2, P50, R12
    chosen = {kernel for row in matrix().values() for cell in row.values() for kernel in cell.split(", ")}
    unseen = {kernel.name for kernel in nvidia_kernels()} - chosen
    assert unseen == set(UNCHOSEN), (
        "a kernel that no cell has changes unseen: add a kind of layer that it is chosen for"
    )


@pytest.mark.parametrize("name", UNCHOSEN)
def test_what_is_chosen_in_no_cell_is_chosen_without_triton(name: str) -> None:  # requirement R12
    library, _, phase = name.partition(".")
    own = FA4 if library == "fa4" else {"flashinfer-python": "0.6.13"}
    with hal.simulate(f"nvidia:sm_90,cuda={CUDA}", libraries={"torch": BASE["torch"], **own}):
        assert hal.select(layers()["Llama-3-8B bfloat16"]).kernels()[phase] == name


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
    ("sm_90", "Gemma-2-9B sliding bfloat16"): "triton.prefill, triton.extend, triton.decode",
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
        slow = {layer for layer, cell in matrix()[f"{arch}, all"].items() if "reference" in cell} - set(KINDS)
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
